"""Serving: a model behind the HTTP interface of OpenAI."""
