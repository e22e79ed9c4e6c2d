// Conversations as files: what is written is read again exactly, and so is what FastChat's `!!save` wrote.
"use strict";
(() => {
  const FORMAT = "fastchat-conversations";
  const MAX_BYTES = 32 * 1024 * 1024;
  const JUDGEMENTS = ["up", "down", "flag"];

  function download(conversations) {
    const text = JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `fastchat-${new Date().toISOString().slice(0, 10)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // The conversations of a file; none where it holds something else.
  async function conversationsIn(file) {
    try {
      const found = file.size <= MAX_BYTES ? JSON.parse(await file.text()) : null;
      return (ofFastChat(found) ?? ofThisPage(found)).filter((each) => each.messages.length > 0);
    } catch {
      return [];
    }
  }

  const textOr = (value, otherwise) => (typeof value === "string" ? value : otherwise);

  // {roles: [user, assistant], messages: [[role, text], ...]}, where an answer that never came is null.
  function ofFastChat(found) {
    if (!Array.isArray(found?.roles) || !Array.isArray(found.messages)) return null;
    const spoken = found.messages.filter((each) => Array.isArray(each) && typeof each[1] === "string");
    const messages = spoken.map(([role, text]) => ({
      role: role === found.roles[0] ? "user" : "assistant",
      content: text,
    }));
    return [{ messages, system: textOr(found.system_message, "") }];
  }

  function ofThisPage(found) {
    if (found?.format !== FORMAT || !Array.isArray(found.conversations)) return [];
    return found.conversations
      .filter((each) => Array.isArray(each?.messages) && each.messages.every(isMessage))
      .map(({ title, updated, messages, model, system }) => ({
        title: textOr(title, undefined)?.slice(0, 200),
        updated: Number.isFinite(updated) ? updated : undefined,
        messages: messages.map(({ role, content, answer }) => ({ role, content, ...markOf(role, answer) })),
        model: textOr(model, undefined),
        system: textOr(system, null),
      }));
  }

  const isMessage = (each) => ["user", "assistant"].includes(each?.role) && typeof each.content === "string";

  // Which answer of which model a message is, and how it was judged: all that the page needs to show it, or nothing.
  function markOf(role, answer) {
    const { answer_id, model, vote } = answer ?? {};
    const isMark = role === "assistant" && /^[\w-]{1,128}$/.test(textOr(answer_id, "")) && textOr(model, "") !== "";
    return isMark ? { answer: { answer_id, model, vote: JUDGEMENTS.includes(vote) ? vote : null } } : {};
  }

  window.fastchat.files = { JUDGEMENTS, conversationsIn, download };
})();
