"""How well a model and its adapters answer: questions, answers, metrics, reports."""
