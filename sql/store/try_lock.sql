-- Takes the locks that nobody has, and returns the others.
SELECT standpipe.try_lock($1)
