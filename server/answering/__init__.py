"""From what a request asks for to its answer: names, prompts, generations, labels, text."""
