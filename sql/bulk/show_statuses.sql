-- Shows the statuses that are new ($1: DIDs; $2: whether they are active; $3: the status).
SELECT standpipe.show_statuses($1, $2, $3)
