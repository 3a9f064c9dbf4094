"""The page: one HTML file of one run, which opens from disk without a network and reads without JavaScript.

contents     what stands on a page: checkpoints with their report, details and judged criteria
details      what only the evidence tells: entropy by token and position, responses, prompts
conventions  the entropy audit: H in every convention that trackers use
sentence     the verdict on a checkpoint in one sentence
shown        numbers as they are written
drawing      a matplotlib figure as inline SVG: text as text, colours of the page, a title and a description
figures      what is drawn
writing      the file, and how large it may become: page.html and section.html (Jinja2, everything escaped), page.css,
             page.js

matplotlib was chosen over vega-lite and plotly: a figure is 7 to 25 kB of SVG that needs no script, where these need a
bundle of scripts; it prints, and its text can be read aloud and searched.
"""
