"""An independent judge of sentiment: a logistic model on bags of words and word pairs."""

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from rlhf_jax.data import sources


def sentiment(path):
  """Fits the judge.

  Args:
    path: data set of {"text", "label"}, label 1 where the text is positive.

  Returns:
    Function (prompt, response) -> 1.0 if the judge calls their text positive, else 0.0.
  """
  records = [record.fields for record in sources.read(path)]
  model = make_pipeline(
      CountVectorizer(binary=True, ngram_range=(1, 2), min_df=2, token_pattern=r'\S+'),
      LogisticRegression(C=0.3, max_iter=1000))
  model.fit([r['text'] for r in records], [r['label'] for r in records])
  return lambda prompt, response: float(model.predict([prompt + response])[0])
