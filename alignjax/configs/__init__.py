"""The configs that are included; `alignjax configs` lists them. In a clone, experiments/configs is
a link to this folder."""
