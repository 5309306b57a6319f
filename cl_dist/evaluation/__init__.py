"""Scoring of tasks during a run, and metrics over the accuracy matrix.

| module | what it knows |
|---|---|
| `modes` | which mode and metric a task is scored with; no torch |
| `outlook` | warnings and errors about scores before training; no torch |
| `answer_length` | whether generated answers fit the model's positions |
| `evaluate` | scoring tasks on all ranks together |
| `batches` | which rank scores which samples |
| `scorers` | one scorer per mode: label likelihood, generation, perplexity |
| `likelihood` | log-likelihoods of labels and of text |
| `inference` | evaluation mode, padding and greedy generation with a wrapped or sharded model |
| `scores`, `rouge_tokens` | comparing an answer with its reference |
| `result` | the result of a task, and the file of predictions |
| `metrics` | average performance, backward transfer, forgetting and so on |
| `general`, `harness` | general ability, measured with lm-evaluation-harness |
"""
