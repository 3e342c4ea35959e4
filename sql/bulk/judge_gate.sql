-- A gate may have been written while posts were that it applies to.
SELECT standpipe.judge_gate($1)
