"""Draw the logs of runs and write them as a page of HTML."""
