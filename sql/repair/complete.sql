-- From now on, operations of the account that are older than this revision are dead.
SELECT standpipe.complete($1, $2)
