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
    set(given) {
      const text = String(given);
      const end = text.lastIndexOf(">") + 1; // behind it no tag ends, and one would be looked for from every "<"
      html.set.call(this, text.slice(0, end).replace(/<[a-z][^>]*>/gi, withoutHandlers) + text.slice(end));
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

  // ---- dollars: between two of them may be a formula, but also two prices, two variables, two rows of a table ---------
  // Gradio would take all of that for a formula, fences of code included. So it is told of formulas between \( and \), or
  // \[ and \], alone, and those between dollars become such ones right before it looks for them. As in Pandoc they have no
  // blank inside the dollars, and no digit or letter behind them; or blanks on both sides, and look like TeX.

  const FENCED = /^(?:[ \t>]|[-*+] |\d{1,9}[.)] )*(`{3,}(?!`)(?![^\n]*`)|~{3,})[^]*?(?:^[ \t>]*\1|(?![^]))/;
  const INLINE_CODE = /(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n)[^])*?(?<!`)\2(?!`)/;
  const DISPLAYED = /\$\$(?!\$)((?:(?!\n[ \t]*\n)[^])+?)\$\$/;
  const TIGHT = /(?<![\\$\w])\$(?![\s$])((?:\\[^]|[^\\$`\n]|\n(?![ \t]*\n))*?)(?<!\s)\$(?![$\w])/;
  const LOOSE = /(?<![\\$\w])\$(?= )(?=[^$`\n]*[\\^_=])([^$`\n]*)(?<= )\$(?![$\w])/;
  const DOLLARS = new RegExp([FENCED, INLINE_CODE, DISPLAYED, TIGHT, LOOSE].map((each) => each.source).join("|"), "gm");
  const GRADIO_S = /\\\[([\s\S]+?)\\\]/.source; // the first that it looks for

  const replace = String.prototype.replace;
  const withBrackets = (text) =>
    replace.call(text, DOLLARS, (whole, _fence, _ticks, displayed, tight, loose) => {
      if (displayed !== undefined) return `\\[${displayed}\\]`;
      return (tight ?? loose) === undefined ? whole : `\\(${tight ?? loose}\\)`;
    });
  String.prototype.replace = function (pattern, by) {
    const isSearch = pattern instanceof RegExp && pattern.source === GRADIO_S;
    return replace.call(isSearch ? withBrackets(this) : this, pattern, by);
  };

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

  const TOASTS = {
    "Connection Lost": "connection_lost",
    "Connection to the server was lost. Attempting reconnection...": "reconnecting",
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
    for (const element of document.querySelectorAll("[data-testid=toast-body] *")) {
      const key = TOASTS[element.textContent];
      if (key && element.childElementCount === 0) element.textContent = word(key);
    }
  }

  window.fastchat.text = { calm, label };
})();
