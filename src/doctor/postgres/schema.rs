//! Our role's rights, and whether tables and functions are those of this program.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::doctor::{Findings, some_of};
use crate::store::migrate::{self, Found};
use crate::store::{Client, Row, StoreError};

/// Reports the role's missing rights; returns whether there were any.
pub(super) fn missing_rights(role: &str, rows: &[Row], findings: &mut Findings) -> bool {
    const WHAT: &str = "rights";
    let mut by_object: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in rows {
        by_object.entry(row.get("object")).or_default().push(row.get("privilege"));
    }
    if by_object.is_empty() {
        return false;
    }
    let lacking: Vec<String> =
        by_object.iter().map(|(object, rights)| format!("{} on {object}", rights.join(", "))).collect();
    let grants: Vec<String> = by_object
        .iter()
        .map(|(object, rights)| {
            // GRANT ... ON TABLE x; a function's name already includes its arguments.
            format!("GRANT {} ON {object} TO {role}", rights.join(", "))
        })
        .collect();
    findings.error(
        WHAT,
        format!("role {role} lacks {}", some_of(&lacking)),
        format!(
            "as the owner: {}{}",
            grants.iter().take(3).cloned().collect::<Vec<_>>().join("; "),
            if grants.len() > 3 { "; docs/security.md has the remaining statements" } else { "" }
        ),
    );
    true
}

const MIGRATIONS: &str = "migrations";

/// Whether the tables and functions are this program's.
pub(super) async fn migrations(
    config: &Config,
    client: &Client,
    found: &Found,
    row: &Row,
    lacks: bool,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let wanted = migrate::wanted();
    let role: String = row.get("role");
    let plan = match migrate::plan(client).await {
        Ok(plan) => plan,
        // A newer program's tables, or tables of another owner.
        Err(error) if found.version > wanted => {
            findings.error(
                MIGRATIONS,
                error.message,
                "use a standpipe at least as new as the one that migrated it",
            );
            return Ok(());
        }
        Err(error) => {
            findings.error(
                "rights",
                error.message,
                format!(
                    "run `standpipe migrate` once as the owner, then GRANT {role} the owner's role or the rights in \
                     docs/security.md"
                ),
            );
            return Ok(());
        }
    };
    for warning in plan.warnings() {
        findings.warning("tables", warning, "");
    }
    if found.is_current() {
        if !lacks {
            findings.ok("rights", format!("role {role} has every right that applying events needs"));
        }
        findings.ok(
            MIGRATIONS,
            format!("the tables are at version {}, with this program's functions", found.version),
        );
        return Ok(());
    }
    let outdated = match (found.version, found.functions) {
        (0, _) => "there are no tables of standpipe yet".to_owned(),
        (version, _) if version < wanted => format!("the tables are at version {version} of {wanted}"),
        (_, false) => "the functions are those of another version of standpipe".to_owned(),
        _ => "a unique index forbids rows that repositories can legitimately contain".to_owned(),
    };
    outdated_tables(config, client, found, row, outdated, findings).await
}

/// Whether the missing tables and functions will be created, and by whom.
async fn outdated_tables(
    config: &Config,
    client: &Client,
    found: &Found,
    row: &Row,
    outdated: String,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let (role, schema): (String, String) = (row.get("role"), row.get("schema"));
    let mut grants = Vec::new();
    // The first version creates our own schema; later versions create only tables and functions in it.
    if found.version == 0 && !row.get::<_, bool>("may_create_schema") {
        let database: String = row.get("database");
        grants.push(format!("GRANT CREATE ON DATABASE {database} TO {role}"));
    }
    if !row.get::<_, bool>("may_create_table") {
        let schema = if schema.is_empty() { "public" } else { &schema };
        grants.push(format!("GRANT CREATE ON SCHEMA {schema} TO {role}"));
    }
    if found.version > 0 && !owns_functions(client).await? {
        findings.error(
            "rights",
            format!("{outdated}, and role {role} does not own schema standpipe and its contents"),
            "run `standpipe migrate` as the role that owns them",
        );
    } else if !grants.is_empty() {
        findings.error(
            "rights",
            format!("{outdated}, and role {role} may not CREATE what is missing"),
            format!("{}; or run `standpipe migrate` once as the owner", grants.join("; ")),
        );
    } else if config.auto_migrate {
        findings.ok("rights", format!("role {role} may create what is missing"));
        findings.note(
            MIGRATIONS,
            outdated,
            "nothing to do: the next worker to start migrates it, as does `standpipe migrate`",
        );
    } else {
        findings.error(
            MIGRATIONS,
            format!("{outdated}, and AUTO_MIGRATE is false"),
            "run `standpipe migrate`",
        );
    }
    Ok(())
}

async fn owns_functions(client: &Client) -> Result<bool, StoreError> {
    let sql = include_str!("../../../sql/store/may_create.sql");
    Ok(client.query_one(sql, &[]).await?.get(0))
}
