-- Claims handles ($2), in a transaction of its own. $1: accounts that may have no row, sorted. Returns the accounts and the
-- handles that changed.
SELECT standpipe.claim($1, $2)
