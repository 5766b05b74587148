"""The labelling page: FastAPI, server-rendered pages, htmx, no other scripts from elsewhere.

`app.create` makes the application, `serve.run` serves it.
"""
