// What was being written is there again when the page has loaded itself anew, or has asked for name and password again.
"use strict";
(() => {
  const { read, write } = window.fastchat.basics;
  const DRAFTS = "fastchat.drafts"; // one tab's own
  const BOXES = "#message, .message-box";

  let waiting = null; // by the box's id; null before the page has begun, and boxes hold nothing that anybody wrote

  // The chat's own draft, which its start puts back.
  function begin() {
    const { message, ...others } = read(DRAFTS, {}, "sessionStorage");
    waiting = others;
    return message ?? "";
  }

  // The box of another tab comes into being when that is first opened.
  function giveBack() {
    for (const [id, text] of Object.entries(waiting ?? {})) {
      const box = document.querySelector(`#${id} textarea`);
      if (!box) continue;
      delete waiting[id];
      box.value = text;
      box.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }

  function keep() {
    if (waiting === null) return;
    const boxes = [...document.querySelectorAll(`:is(${BOXES}) textarea`)];
    const written = boxes.map((box) => [box.closest(BOXES).id, box.value]);
    write(DRAFTS, { ...waiting, ...Object.fromEntries(written) }, "sessionStorage");
  }

  window.fastchat.drafts = { begin, giveBack, keep };
})();
