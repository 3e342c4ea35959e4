-- One call for operations that share a transaction.
SELECT standpipe.apply($1, $2, $3, $4, $5, $6, $7)
