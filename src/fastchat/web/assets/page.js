// The browser's own part of the page: the conversations and where they are kept, and what is pressed. It runs last of our
// scripts, before Gradio's. `window.fastchat` is what the events of chat_tab.py call.
"use strict";
(() => {
  const { read, write, remove, word, switchLanguage, make, icon, iconButton, press, tell } = window.fastchat.basics;
  const { applyTheme, switchTheme } = window.fastchat.basics;
  const { askModels, followModels, isServed, drawModelState } = window.fastchat.models;
  const { chooseModel, noteChosen, modelField, pairFields } = window.fastchat.models;
  const { JUDGEMENTS, conversationsIn, download } = window.fastchat.files;
  const { calm, label } = window.fastchat.text;
  const { drafts } = window.fastchat;

  const INDEX = "fastchat.conversations";
  const ONE = "fastchat.conversation.";
  const SETTINGS = "fastchat.settings";
  const MODEL = "fastchat.model";
  const SPEED = "fastchat.speed";
  const CURRENT = "fastchat.current"; // one tab's own
  const SAVE_EVERY_MS = 500;
  const ASK_MODELS_EVERY_MS = 2000;

  // ---- conversations -------------------------------------------------------------------------------------------

  let current = null; // the id of the shown conversation; null before its first message
  let known = "null"; // its messages as this tab last read or wrote them
  let pending = null; // what is to be written, and the timer that will
  let timer = 0;
  let toShow = null; // what `opened` hands to Gradio
  let returnToBox = ""; // what `opened` leaves in the message box

  const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  const entries = () => read(INDEX, []).filter((entry) => entry && typeof entry.id === "string");

  function plain(pane) {
    const textOf = (content) =>
      typeof content === "string" ? content : (content ?? []).map((part) => part.text ?? "").join("\n");
    return (pane ?? []).map((message) => {
      const { answer_id, model, vote } = message.metadata ?? {};
      const mark = answer_id ? { answer: { answer_id, model, vote: vote ?? null } } : {};
      return { role: message.role, content: textOf(message.content), ...mark };
    });
  }

  const forPane = (messages) =>
    messages.map((message) => ({
      role: message.role,
      content: [{ type: "text", text: message.content }],
      metadata: message.answer ? { title: null, ...message.answer } : null,
      options: null,
    }));

  // The buttons below the last answer, for as long as that has not been judged; then they show how it was.
  let judged = {};

  function drawJudging(messages) {
    const answer = messages.at(-1)?.answer ?? null;
    document.body.classList.toggle("can-judge", answer !== null);
    for (const vote of JUDGEMENTS) {
      const button = document.getElementById(`judge-${vote}`);
      button?.setAttribute("aria-pressed", String(answer?.vote === vote));
      button?.toggleAttribute("disabled", Boolean(answer?.vote) && answer.vote !== vote);
    }
    if (answer?.vote && judged.answer_id === answer.answer_id && !judged.vote) tell(word("judged"));
    judged = answer ?? {};
  }

  function titleOf(messages) {
    const first = messages.find((message) => message.role === "user")?.content ?? "";
    const line = first.trim().split("\n")[0];
    return line.length > 60 ? `${line.slice(0, 60)}…` : line;
  }

  const messagesOf = (conversation) => JSON.stringify(conversation?.messages ?? null);

  function save() {
    clearTimeout(timer);
    timer = 0;
    if (pending === null) return;
    const { messages, settings } = pending;
    pending = null;
    const stored = messagesOf(read(ONE + current, null));
    if (stored !== "null" && stored !== known) current = newId(); // another tab went on with it: both are kept
    const id = current;
    const others = entries();
    const entry = others.find((each) => each.id === id) ?? { id, title: null };
    const written = write(ONE + id, { messages, ...settings });
    if (!written) return;
    known = JSON.stringify(messages);
    entry.title ??= titleOf(messages);
    entry.updated = Date.now();
    write(INDEX, [entry, ...others.filter((each) => each.id !== id)]);
    drawList();
  }

  function keep(pane, model, system) {
    const messages = plain(pane);
    drawJudging(messages);
    const isNew = current === null;
    if (JSON.stringify(messages) === known || (isNew && messages.length === 0)) {
      pending = null;
      return;
    }
    pending = { messages, settings: { model, system } };
    current ??= newId();
    if (isNew) save();
    else if (timer === 0) timer = setTimeout(save, SAVE_EVERY_MS);
  }

  function open(id) {
    save();
    if (document.body.classList.contains("answering")) press("stop");
    const conversation = id === null ? null : read(ONE + id, null);
    current = conversation === null ? null : id;
    known = messagesOf(conversation);
    toShow = conversation ?? { messages: [], system: undefined };
    returnToBox = "";
    press("open-switch");
    drawList();
    document.body.classList.remove("list-open");
    document.querySelector("#message textarea")?.focus();
  }

  const NOTHING = { __type__: "update" };

  function shownValues(conversation) {
    const system = conversation.system === undefined ? NOTHING : (conversation.system ?? "");
    const settings = [NOTHING, system, NOTHING, NOTHING, NOTHING, NOTHING];
    if (conversation.model && isServed(conversation.model)) settings[0] = conversation.model;
    return [returnToBox, forPane(conversation.messages), "", ...settings];
  }

  function opened() {
    const conversation = toShow ?? { messages: [] };
    toShow = null;
    return shownValues(conversation);
  }

  // Another tab goes on with the conversation that is shown here: what this one keeps next has to hold that too.
  function follow(event) {
    if (event.key === ONE + current) save(); // what this tab has not written yet is none of the other's
    drawList();
    if (current === null || event.key !== ONE + current || document.body.classList.contains("answering")) return;
    toShow = read(ONE + current, null);
    returnToBox = NOTHING;
    if (toShow === null) return;
    known = messagesOf(toShow);
    press("open-switch");
  }

  function rename(id) {
    const known = entries();
    const entry = known.find((each) => each.id === id);
    const title = window.prompt(word("rename_question"), entry.title)?.trim();
    if (!title) return;
    entry.title = title.slice(0, 200);
    write(INDEX, known);
    drawList();
  }

  function forget(id) {
    if (!window.confirm(word("delete_question"))) return;
    if (current === id) {
      pending = null;
      open(null);
    }
    write(INDEX, entries().filter((each) => each.id !== id));
    remove(ONE + id);
    drawList();
  }

  function exportAll(ids) {
    save();
    const chosen = entries().filter((entry) => ids === null || ids.includes(entry.id));
    download(
      chosen.map(({ id, title, updated }) => ({ title, updated, ...read(ONE + id, { messages: [] }) })),
    );
  }

  async function importFile(file) {
    const found = await conversationsIn(file);
    if (found.length === 0) return tell(word("import_failed"));
    const added = [];
    for (const { title, updated, ...conversation } of found) {
      const id = newId();
      if (!write(ONE + id, conversation)) break;
      added.push({ id, title: title ?? titleOf(conversation.messages), updated: updated ?? Date.now() });
    }
    if (added.length === 0) return;
    write(INDEX, [...added, ...entries()]);
    drawList();
    tell(word("imported", { count: added.length }));
    open(added[0].id);
  }

  // ---- what an event of the page calls -------------------------------------------------------------------------

  const answeringIn = (kind) => (kind ? `answering-${kind}` : "answering");

  // Whoever asks wants to see the answer: at its end a pane follows what comes.
  function begin(values, kind) {
    for (const pane of document.querySelectorAll(kind ? `#${kind}-main .bubble-wrap` : "#chat .bubble-wrap"))
      pane.scrollTop = pane.scrollHeight;
    document.body.classList.add(answeringIn(kind));
    return values;
  }

  function end(kind) {
    document.body.classList.remove(answeringIn(kind));
    save();
  }

  function stopped(pane) {
    end();
    const unanswered = plain(pane).at(-1)?.role === "user";
    if (!unanswered) return [""];
    const button = `<button type="button" data-press="retry-switch">${word("try_again")}</button>`;
    return [`<div class="notice" role="status"><span></span>${button}</div>`];
  }

  function keepSettings(model, system, temperature, topP, maxTokens, seed) {
    if (typeof model === "string" && model) write(MODEL, model);
    noteChosen(model);
    write(SETTINGS, { temperature, topP, maxTokens, seed });
  }

  async function start() {
    await askModels();
    const kept = read(SETTINGS, {});
    const latest = entries()[0];
    const wanted = new URLSearchParams(location.search).get("model");
    const last = read(CURRENT, null, "sessionStorage") ?? latest?.id;
    const conversation = wanted === null && last ? read(ONE + last, null) : null;
    current = conversation === null ? null : last;
    known = messagesOf(conversation);
    returnToBox = drafts.begin();
    const values = shownValues(conversation ?? { messages: [] });
    const model = chooseModel(wanted ?? conversation?.model ?? read(MODEL, null));
    drawAll();
    noteChosen(model);
    openTab();
    setInterval(followModels, ASK_MODELS_EVERY_MS);
    return [
      ...values.slice(0, 3),
      modelField(model),
      values[4],
      kept.temperature ?? NOTHING,
      kept.topP ?? NOTHING,
      kept.maxTokens ?? NOTHING,
      kept.seed ?? NOTHING,
      ...pairFields([]),
    ];
  }

  // FastChat's `?compare`, `?arena` and `?leaderboard`.
  function openTab() {
    const asked = new URLSearchParams(location.search);
    const number = ["chat", "compare", "arena", "leaderboard"].findIndex((name, at) => at > 0 && asked.has(name));
    if (number > 0) document.querySelectorAll("#tabs [role=tab]")[number]?.click();
  }

  // ---- drawing ------------------------------------------------------------------------------------------------------

  function drawList() {
    const list = document.getElementById("conversation-list");
    if (!list) return;
    const known = entries();
    list.replaceChildren(
      ...known.map((entry) =>
        make(
          "li",
          { class: entry.id === current ? "is-current" : null },
          make(
            "button",
            {
              type: "button",
              class: "conversation",
              "aria-current": entry.id === current ? "true" : null,
              title: entry.title,
              onclick: () => open(entry.id),
            },
            entry.title || word("untitled"),
          ),
          iconButton("pen", word("rename"), () => rename(entry.id)),
          iconButton("down", word("export_one"), () => exportAll([entry.id])),
          iconButton("bin", word("delete"), () => forget(entry.id)),
        ),
      ),
    );
    document.getElementById("no-conversations").hidden = known.length > 0;
    write(CURRENT, current, "sessionStorage");
  }

  function drawAll() {
    const place = document.getElementById("conversations");
    if (!place || place.childElementCount > 0) return;
    const picker = make("input", { type: "file", accept: ".json,application/json", hidden: "" });
    picker.addEventListener("change", () => {
      if (picker.files[0]) importFile(picker.files[0]);
      picker.value = "";
    });
    const textButton = (text, onclick, attributes = {}) =>
      make("button", { type: "button", class: "text-button", onclick, ...attributes }, text);
    place.append(
      make("div", { class: "brand" }, make("img", { src: "./page/icon.svg", alt: "", width: 26, height: 26 }), "FastChat"),
      make("button", { type: "button", id: "new-chat", onclick: () => open(null) }, icon("plus"), word("new_chat")),
      make("nav", { "aria-label": word("conversations") }, make("ul", { id: "conversation-list" })),
      make("p", { id: "no-conversations" }, word("no_conversations")),
      make(
        "div",
        { class: "sidebar-end" },
        textButton(word("import"), () => picker.click(), { id: "import" }),
        textButton(word("export"), () => exportAll(null), { id: "export" }),
        picker,
      ),
    );
    document.getElementById("bar-start").append(
      iconButton("menu", word("show_conversations"), () => document.body.classList.toggle("list-open")),
    );
    document.getElementById("bar-end").append(
      make("span", { id: "model-state", role: "status" }),
    );
    document.getElementById("page-end").append(
      textButton(word("language"), switchLanguage, { id: "language-switch", "aria-label": word("language_label") }),
      textButton("", switchTheme, { id: "theme-switch", title: word("theme_label") }),
    );
    const judging = document.getElementById("judge");
    judging.setAttribute("role", "group");
    judging.setAttribute("aria-label", word("judge_label"));
    document.body.classList.toggle("show-speed", read(SPEED, false));
    drawSpeedSwitch();
    drawList();
    drawModelState();
    applyTheme();
  }

  // The fold's content comes into being when it is first opened.
  function drawSpeedSwitch() {
    const place = document.getElementById("settings-end");
    if (!place || place.childElementCount > 0) return;
    const box = make("input", { type: "checkbox", id: "show-speed" });
    box.checked = read(SPEED, false);
    box.addEventListener("change", () => {
      write(SPEED, box.checked);
      document.body.classList.toggle("show-speed", box.checked);
    });
    place.append(make("label", {}, box, word("show_speed")));
  }

  // Ctrl+Enter sends what is written, also the earlier message that is edited; Escape leaves that one as it was. While
  // an answer comes nothing is sent: a second one would be written into the same pane.
  function useKeys(event) {
    if (event.key === "Escape") document.body.classList.remove("list-open");
    const box = event.target.closest?.(".edit-textarea, :is(#message, .message-box) textarea");
    const isSent = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    const isEdit = box?.matches(".edit-textarea");
    if (!box || event.isComposing) return;
    const kind = box.closest(".arena")?.id.replace("-main", "");
    const asks = isSent || (event.key === "Enter" && !event.shiftKey && !isEdit);
    if (asks && document.body.classList.contains(answeringIn(kind))) return event.preventDefault();
    if (!isSent && !(isEdit && event.key === "Escape")) return;
    event.preventDefault();
    if (!isEdit) press(box.closest("#message, .message-box").id.replace("message", "send"));
    else box.closest("#chat, .pane").querySelector(`[aria-label="${word(isSent ? "submit" : "cancel")}"]`)?.click();
  }

  function watch() {
    new MutationObserver((changes) => {
      if (!changes.some((change) => change.addedNodes.length > 0)) return;
      const chat = document.getElementById("tabs");
      if (chat) label(chat);
      for (const pane of document.querySelectorAll("[data-testid='bot'], [data-testid='user']")) calm(pane);
      for (const place of document.querySelectorAll("[data-word]:empty:not(.message *)"))
        place.textContent = word(place.dataset.word);
      drawSpeedSwitch();
      drafts.giveBack();
    }).observe(document.body, { childList: true, subtree: true });
    document.addEventListener("keydown", useKeys);
    document.body.addEventListener("click", (event) => {
      const target = event.target.closest?.(":is(#status, .status) [data-press]"); // never one of a model's own
      if (target) press(target.dataset.press);
      else if (!event.target.closest?.("#sidebar, #bar-start")) document.body.classList.remove("list-open");
    });
    window.addEventListener("pagehide", () => {
      save();
      drafts.keep();
    });
    window.addEventListener("storage", follow);
  }

  document.addEventListener("DOMContentLoaded", watch);

  Object.assign(window.fastchat, { begin, end, stopped, keep, keepSettings, opened, start });
})();
