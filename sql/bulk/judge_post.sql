-- A post may have been written while gates were that apply to it.
SELECT standpipe.judge_post($1, $2, $3)
