-- Removes some rows of one kind; returns how many.
SELECT standpipe.purge($1, $2, $3)
