"""The versions of alignjax's own measurements.

What a function of alignjax measured is kept under the version that stands here, and a new version
makes every kept result of it a thing of the past. So a function gets a new version when its numbers
come out differently, and keeps the one that it has when it is moved, renamed or reformatted.
tests/test_versions.py measures a small example of each and says where a version has been forgotten.

The first versions are fingerprints of the sources at alignjax 0.1.0, under which that release kept
its results: those stay valid. A new version is any other text, such as '2'.
"""

VERSIONS = {
  'alignjax.evals.preference.judges:reward_model': 'ade97de349edeb42',
  'alignjax.evals.preference.responses:respond': 'd9992537db3cb833',
  'alignjax.evals.public.nlp:cnn_dm': '7f499de6519ebf3e',
  'alignjax.evals.public.nlp:drop': 'ed75bc432fe498a6',
  'alignjax.evals.public.nlp:hellaswag': '4cff976b639920a9',
  'alignjax.evals.public.nlp:quac': 'b03196daea7a593a',
  'alignjax.evals.public.nlp:rte': '556c5099a3c490b1',
  'alignjax.evals.public.nlp:squadv2': 'f729754d85eda00f',
  'alignjax.evals.public.nlp:sst': 'bdac885ce02640c2',
  'alignjax.evals.public.nlp:tldr': '31224b8448e2fb28',
  'alignjax.evals.public.nlp:truthfulqa_mc': '8e56d6baead77a08',
  'alignjax.evals.public.nlp:wmt15_fr_en': 'ad98361d0158f219',
  'alignjax.evals.public.nlp:wsc': '1001fa2fab18d1f7',
  'alignjax.evals.public.text:text_loss': '1',
  'alignjax.evals.reward.benchmarks:hhh': '1',
  'alignjax.evals.reward.benchmarks:judgebench': '1',
  'alignjax.evals.reward.benchmarks:llmbar': '1',
  'alignjax.evals.reward.benchmarks:rewardbench2': '1',
  'alignjax.evals.reward.labelers:split': '4de015944030c6bc',
  # Version 2 names the kinds of bias in the rows of the hub, which were numbers.
  'alignjax.evals.safety.bias:crows_pairs': '2',
  'alignjax.evals.safety.bias:winogender': '397d215ce5a28da8',
  'alignjax.evals.safety.scorers:detoxify': '68e8ccac5bb9cadc',
  'alignjax.evals.safety.scorers:perspective': 'e4271de86a8761f4',
  'alignjax.evals.safety.scorers:profanity': '81e3289ed67a3a84',
  'alignjax.evals.safety.toxicity:realtoxicityprompts': '6d7e34b3188e0b94',
  'alignjax.evals.safety.truthfulness:judge_agreement': '46277d949965c40b',
  'alignjax.evals.safety.truthfulness:truthfulqa': '81952b77b13ae17c',
  'alignjax.evals.sandbox:measure': '5532f336d0cc4963',
  'alignjax.inference.samples:make_responder': '71302dffe67861af',
  'alignjax.models.transformer:make_networks': '73f0850ae5449729',
}
