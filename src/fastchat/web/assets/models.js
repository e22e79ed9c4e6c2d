// Which models there are: asked of the page's server again and again, shown in the selectors.
"use strict";
(() => {
  const { read, word, press } = window.fastchat.basics;
  const MODEL = "fastchat.model";

  let models = { models: [], loading: [], is_reachable: true };

  async function askModels() {
    try {
      const answer = await fetch("./page/models", { cache: "no-store" });
      if (answer.ok) models = await answer.json();
    } catch {
      models = { models: [], loading: [], is_reachable: false };
    }
    drawModelState();
  }

  async function followModels() {
    if (document.hidden) return;
    const before = JSON.stringify(models);
    await askModels();
    if (JSON.stringify(models) !== before) press("models-switch");
  }

  const chooseModel = (wanted) =>
    [...models.models, ...models.loading].includes(wanted) ? wanted : (models.models[0] ?? models.loading[0] ?? null);

  function modelField(value) {
    const choices = [
      ...models.models.map((name) => [name, name]),
      ...models.loading.map((name) => [`${name} ${word("loading_suffix")}`, name]),
    ];
    return { __type__: "update", choices, value };
  }

  // Two selectors: each keeps its model while that is served, and they begin with different ones.
  const pairFields = (chosen) =>
    [0, 1].map((at) =>
      modelField(models.models.includes(chosen[at]) ? chosen[at] : (models.models[at] ?? models.models[0] ?? null)),
    );

  const modelUpdate = (chosen, ...pair) => [modelField(chooseModel(chosen ?? read(MODEL, null))), ...pairFields(pair)];

  function drawModelState() {
    const place = document.getElementById("model-state");
    if (!place) return;
    let text = "";
    if (!models.is_reachable) text = word("api_unreachable");
    else if (models.models.length === 0 && models.loading.length > 0)
      text = word("models_loading", { models: models.loading.join(", ") });
    else if (models.models.length === 0) text = word("no_models");
    if (place.textContent !== text) place.textContent = text;
  }

  const isServed = (name) => models.models.includes(name);

  window.fastchat.models = { askModels, followModels, isServed, chooseModel, modelField, pairFields, drawModelState };
  window.fastchat.modelUpdate = modelUpdate;
})();
