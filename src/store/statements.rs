//! The cost of PostgreSQL's statements, from the extension `pg_stat_statements`.

use tokio_postgres::Client;

use super::StoreError;

/// One statement and its cost so far.
#[derive(Clone, Debug)]
pub struct Statement {
    /// Its text, on one line and shortened.
    pub text: String,
    /// How often it ran.
    pub calls: i64,
    /// How long in total, in milliseconds.
    pub total_ms: f64,
    /// How long on average, in milliseconds.
    pub mean_ms: f64,
    /// How many rows it returned or changed.
    pub rows: i64,
    /// Its share of the time of all statements, from 0 to 1.
    pub share: f64,
}

/// The ten on which the most time was spent; `None` without the extension. The extension replaces constants in
/// statements, except in utility commands, which are left out.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn look(client: &Client) -> Result<Option<Vec<Statement>>, StoreError> {
    let schema = client.query_opt(include_str!("../../sql/store/statements_schema.sql"), &[]).await?;
    let Some(schema) = schema else { return Ok(None) };
    let sql = include_str!("../../sql/store/statements.sql").replace("pg_stat_schema", schema.get(0));
    let rows = client.query(&sql, &[]).await?;
    let statement = |row: &tokio_postgres::Row| Statement {
        text: row.get::<_, &str>(0).split_whitespace().collect::<Vec<_>>().join(" "),
        calls: row.get(1),
        total_ms: row.get(2),
        mean_ms: row.get(3),
        rows: row.get(4),
        share: row.get(5),
    };
    Ok(Some(rows.iter().map(statement).collect()))
}
