"""Two commits of tlcr: installed (`commits`), timed in turn (`rounds` of `cases`), and told apart (`ratios`)."""
