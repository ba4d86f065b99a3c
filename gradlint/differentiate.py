from gradlint.reverse import *  # noqa: F403
from gradlint.reverse import Cut, backward, differentiate  # noqa: F401
