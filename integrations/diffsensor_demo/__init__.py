"""The demonstration: a small model is fine-tuned, and the readings name what was planted in its data."""

from diffsensor_demo.command import demo as demo
from diffsensor_demo.corpus import Corpus as Corpus
from diffsensor_demo.habit import Habit as Habit
