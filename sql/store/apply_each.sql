-- One call for many events, each in a transaction of its own.
CALL standpipe.apply_each($1, $2)
