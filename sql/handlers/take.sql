-- Takes a task, if nobody else works on it, and says whether there is a function for it. 29298 is an arbitrary number.
SELECT pg_try_advisory_lock(29298, hashtext($1::text || ' ' || $2::text)),
       to_regprocedure(format('%I.%I(jsonb)', $3::text, $1::text)) IS NOT NULL
