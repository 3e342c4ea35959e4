//! Whether the functions for tasks are there, and may be called.

use crate::doctor::{Findings, some_of};
use crate::store::{Client, StoreError};

const WHAT: &str = "handlers";

pub(super) async fn handlers(
    schema: &str,
    client: &Client,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let row = client.query_one(include_str!("../../../sql/check/handlers.sql"), &[&schema]).await?;
    let (exists, usable): (bool, bool) = (row.get(0), row.get(1));
    let (functions, refused): (Vec<String>, Vec<String>) = (row.get(2), row.get(3));
    let role: String = row.get(4);
    if !exists {
        findings.error(
            WHAT,
            format!("there is no schema {schema} (HANDLERS)"),
            format!(
                "CREATE SCHEMA {schema}, with a function name(jsonb) returns jsonb for each type of task"
            ),
        );
    } else if !usable {
        findings.error(
            WHAT,
            format!("role {role} may not use the schema {schema} (HANDLERS)"),
            format!("GRANT USAGE ON SCHEMA {schema} TO {role}"),
        );
    } else if !refused.is_empty() {
        findings.error(
            WHAT,
            format!("role {role} may not call {}", some_of(&refused)),
            format!("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role}"),
        );
    } else if functions.is_empty() {
        findings.warning(
            WHAT,
            format!("the schema {schema} (HANDLERS) has no function that takes and returns jsonb"),
            format!("CREATE FUNCTION {schema}.name(jsonb) RETURNS jsonb ...: until then, every task becomes a dead letter"),
        );
    } else {
        findings.ok(WHAT, format!("functions in {schema}: {}", some_of(&functions)));
    }
    Ok(())
}
