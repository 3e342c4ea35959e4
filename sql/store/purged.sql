-- Nothing is left of what the account had written before this deletion.
SELECT standpipe.purged($1, $2)
