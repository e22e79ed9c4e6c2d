// What a model or a user wrote stays text, and what Gradio labels speaks the page's language.
"use strict";
(() => {
  const { make, word } = window.fastchat.basics;

  // ---- text stays text ------------------------------------------------------------------------------------------
  // Gradio shows Markdown without scripts. This takes out what could still fetch or cover: styles that name an address,
  // and diagrams, which would be drawn from the model's text. It runs before the browser lays the new nodes out.

  // A handler would be refused by the page's policy, with an error in the console for each. The text loses it before the
  // browser reads it as HTML, which Gradio does in a template.
  const html = Object.getOwnPropertyDescriptor(Element.prototype, "innerHTML");
  const withoutHandlers = (tag) => tag.replace(/[\s/"']on\w+\s*=\s*("[^"]*"|'[^']*'|[^\s>]*)/gi, " ");
  Object.defineProperty(HTMLTemplateElement.prototype, "innerHTML", {
    get: html.get,
    set(text) {
      html.set.call(this, String(text).replace(/<[a-z][^>]*>/gi, withoutHandlers));
    },
    configurable: true,
  });

  function calm(root) {
    for (const element of root.querySelectorAll("[style]")) {
      if (/url|image|src|@|\\|position\s*:\s*(fixed|sticky|absolute)/i.test(element.getAttribute("style")) && !element.closest(".katex"))
        element.removeAttribute("style");
    }
    // A name of ours would give it our looks, and some of ours lie over everything.
    for (const element of root.querySelectorAll("[id]")) if (!element.closest(".katex, svg")) element.removeAttribute("id");
    for (const element of root.querySelectorAll("[background]")) element.removeAttribute("background");
    for (const diagram of root.querySelectorAll(".mermaid:not([data-processed])")) {
      diagram.replaceWith(make("pre", {}, make("code", {}, diagram.textContent)));
    }
  }

  // ---- Gradio's own labels, which know one language ------------------------------------------------------------

  const LABELS = {
    Clear: "clear",
    "Copy message": "copy_message",
    "Copied message": "copied_message",
    Edit: "edit",
    Retry: "retry",
    Undo: "undo",
    Submit: "submit",
    Cancel: "cancel",
    "Copy code": "copy_code",
    "chatbot conversation": "chat_pane",
  };

  function label(root) {
    for (const element of root.querySelectorAll("[aria-label]")) {
      const text = element.getAttribute("aria-label");
      const key = LABELS[text];
      const [, who, rest] = text.match(/^(user|bot)'s message: ([^]*)$/) ?? [];
      if (key) element.setAttribute("aria-label", word(key));
      else if (who) element.setAttribute("aria-label", `${word(who === "user" ? "you_said" : "model_said")} ${rest}`);
    }
    for (const element of root.querySelectorAll("[title]")) {
      const key = LABELS[element.title];
      if (key) element.title = word(key);
    }
  }

  window.fastchat.text = { calm, label };
})();
