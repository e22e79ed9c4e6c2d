// Which models there are: asked of the page's server again and again, shown in the selectors.
"use strict";
(() => {
  const { read, word, press } = window.fastchat.basics;
  const MODEL = "fastchat.model";
  const SUFFIXES = { loading: "loading_suffix", asleep: "asleep_suffix" };

  let models = { models: [], absences: {}, loading: [], is_reachable: true };
  let chosen = null; // the chat's model, whose state the line beside it tells

  async function askModels() {
    try {
      const answer = await fetch("./page/models", { cache: "no-store" });
      if (answer.ok) models = await answer.json();
    } catch {
      models = { models: [], absences: {}, loading: [], is_reachable: false };
    }
    drawModelState();
  }

  const absenceOf = (name) => models.absences?.[name] ?? null;

  function labelOf(name) {
    const suffix = models.loading.includes(name) ? "loading_suffix" : SUFFIXES[absenceOf(name)?.state];
    return suffix ? `${name} ${word(suffix)}` : name;
  }

  // What the selectors show. How far a model has been read is told beside them alone: an open list is not drawn again.
  const shownChoices = () => [...models.models, ...models.loading].map((name) => [labelOf(name), name]);

  async function followModels() {
    if (document.hidden) return;
    const before = JSON.stringify(shownChoices());
    await askModels();
    if (JSON.stringify(shownChoices()) !== before) press("models-switch");
  }

  const chooseModel = (wanted) =>
    [...models.models, ...models.loading].includes(wanted) ? wanted : (models.models[0] ?? models.loading[0] ?? null);

  const modelField = (value) => ({ __type__: "update", choices: shownChoices(), value });

  // Two selectors: each keeps its model while that is served, and they begin with different ones.
  const pairFields = (pair) =>
    [0, 1].map((at) =>
      modelField(models.models.includes(pair[at]) ? pair[at] : (models.models[at] ?? models.models[0] ?? null)),
    );

  const modelUpdate = (model, ...pair) => [modelField(chooseModel(model ?? read(MODEL, null))), ...pairFields(pair)];

  function noteChosen(name) {
    chosen = name;
    drawModelState();
  }

  function stateText() {
    if (!models.is_reachable) return word("api_unreachable");
    if (models.models.length === 0 && models.loading.length > 0)
      return word("models_loading", { models: models.loading.join(", ") });
    if (models.models.length === 0) return word("no_models");
    if (models.loading.includes(chosen)) return word("models_loading", { models: chosen });
    const absence = absenceOf(chosen);
    return absence === null ? "" : word(`model_${absence.state}`, { model: chosen, percent: absence.percent });
  }

  function drawModelState() {
    const place = document.getElementById("model-state");
    if (!place) return;
    const text = stateText();
    if (place.textContent !== text) place.textContent = text;
  }

  const isServed = (name) => models.models.includes(name);

  window.fastchat.models = { askModels, followModels, isServed, chooseModel, noteChosen, modelField, pairFields };
  window.fastchat.models.drawModelState = drawModelState;
  window.fastchat.modelUpdate = modelUpdate;
})();
