SELECT standpipe.complete($1, $2)
