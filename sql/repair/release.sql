-- Lets others take a repository.
SELECT pg_advisory_unlock(29297, hashtext($1))
