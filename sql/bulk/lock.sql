-- Begins the transaction: locks the partitions of these accounts ($1).
SELECT standpipe.lock_partitions($1)
