// What the other scripts of the page share: storage, the language, light and dark, elements. It runs first of them all.
"use strict";
(() => {
  const LANGUAGE = "fastchat.language";
  const THEME = "fastchat.theme";

  // ---- storage: a browser may forbid it, and then the page remembers for as long as it is open -------------------

  const memory = new Map();

  // `store` is `localStorage`, or `sessionStorage` for what is one tab's own.
  function read(key, otherwise, store = "localStorage") {
    try {
      const text = memory.get(key) ?? window[store].getItem(key);
      return text === null ? otherwise : JSON.parse(text);
    } catch {
      return otherwise;
    }
  }

  function write(key, value, store = "localStorage") {
    const text = JSON.stringify(value);
    try {
      window[store].setItem(key, text);
      return true;
    } catch (error) {
      const isFull = error instanceof DOMException && error.name !== "SecurityError";
      if (isFull) tell(word("storage_full"));
      else if (memory.size === 0) tell(word("storage_denied"));
      if (!isFull) memory.set(key, text);
      return !isFull;
    }
  }

  function remove(key) {
    memory.delete(key);
    try {
      localStorage.removeItem(key);
    } catch {}
  }

  // ---- language: chosen here, else the browser's; Gradio asks the navigator --------------------------------------

  function chosenLanguage() {
    const kept = read(LANGUAGE, null);
    if (kept === "en" || kept === "zh") return kept;
    return (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
  }

  const language = chosenLanguage();
  const locale = language === "zh" ? "zh-CN" : "en";
  Object.defineProperty(navigator, "language", { get: () => locale });
  Object.defineProperty(navigator, "languages", { get: () => [locale] });
  document.documentElement.lang = locale;
  document.cookie = `fastchat_language=${language}; path=/; SameSite=Lax; max-age=31536000`;

  function word(key, facts = {}) {
    return window.fastchatTexts[language][key].replace(/\{(\w+)\}/g, (place, name) => facts[name] ?? place);
  }

  function switchLanguage() {
    write(LANGUAGE, language === "zh" ? "en" : "zh");
    location.reload();
  }

  // ---- light and dark: chosen here, else the system's -------------------------------------------------------------

  const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (read(THEME, null) ?? (darkSystem.matches ? "dark" : "light")) === "dark";

  function applyTheme() {
    const dark = isDark();
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    if (document.body && document.body.classList.contains("dark") !== dark) {
      document.body.classList.toggle("dark", dark);
    }
    const button = document.getElementById("theme-switch");
    if (button) button.textContent = word(dark ? "theme_light" : "theme_dark");
  }

  function switchTheme() {
    write(THEME, isDark() ? "light" : "dark");
    applyTheme();
  }

  document.addEventListener("DOMContentLoaded", () => {
    applyTheme();
    new MutationObserver(applyTheme).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });
  darkSystem.addEventListener("change", applyTheme);

  // ---- elements -------------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const ICONS = {
    menu: "M4 6h16M4 12h16M4 18h16",
    plus: "M12 5v14M5 12h14",
    pen: "M4 20h4L19 9l-4-4L4 16z",
    down: "M12 4v11m0 0 4-4m-4 4-4-4M5 20h14",
    bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  };

  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
  }

  const iconButton = (name, text, onclick) =>
    make("button", { type: "button", class: "icon-button", "aria-label": text, title: text, onclick }, icon(name));

  // The buttons that Gradio listens to are hidden; ours press them.
  function press(id) {
    document.getElementById(id)?.click();
  }

  const notes = make("div", { id: "notes", role: "status" });
  document.addEventListener("DOMContentLoaded", () => document.body.append(notes));

  function tell(text) {
    if ([...notes.children].some((note) => note.textContent === text)) return;
    const note = make("div", { class: "note" }, text);
    notes.append(note);
    setTimeout(() => note.remove(), 6000);
  }

  const basics = { read, write, remove, word, switchLanguage, make, icon, iconButton, press, tell };
  window.fastchat = { basics: { ...basics, applyTheme, switchTheme } };
})();
