//! Our user's rights.

use super::permitted;
use crate::config::Config;
use crate::doctor::Findings;
use crate::stream::{Stream, StreamResult, rights};

/// Whether our user has every right that the pipelines and the reader need.
pub(super) async fn may_do_everything(
    config: &Config,
    connection: &mut Stream,
    findings: &mut Findings,
) -> StreamResult<bool> {
    const WHAT: &str = "rights";
    let who = permitted(connection.who_am_i().await);
    let who = who.ok().flatten().map_or_else(|| "this user".to_owned(), |name| format!("user {name}"));
    let Some(missing) = connection.missing_rights().await? else {
        findings.error(
            WHAT,
            format!("{who} may not use MULTI and DISCARD, without which its rights cannot be tested"),
            "ACL SETUSER <user> +multi +exec +discard; docs/security.md has the complete rule",
        );
        return Ok(false);
    };
    let mut good = true;
    if !missing.commands.is_empty() {
        good = false;
        let upper: Vec<String> =
            missing.commands.iter().map(|command| command.to_uppercase().replace('|', " ")).collect();
        let rule: Vec<String> = missing.commands.iter().map(|command| format!("+{command}")).collect();
        findings.error(
            WHAT,
            format!("{who} may not use {}", upper.join(", ")),
            format!("ACL SETUSER <user> {}", rule.join(" ")),
        );
    }
    if !missing.keys.is_empty() {
        good = false;
        let rule: Vec<String> = missing.keys.iter().map(|key| format!("~{key}")).collect();
        findings.error(
            WHAT,
            format!("{who} may not read and write {}", missing.keys.join(", ")),
            format!("ACL SETUSER <user> {}", rule.join(" ")),
        );
    }
    if !missing.legacy_keys.is_empty() && config.legacy_status != Some(false) {
        let rule: Vec<String> = missing.legacy_keys.iter().map(|key| format!("~{key}")).collect();
        findings.warning(
            WHAT,
            format!(
                "{who} may not use {}, which the old application's pages read",
                missing.legacy_keys.join(", ")
            ),
            format!("ACL SETUSER <user> {}, or set LEGACY_STATUS=false", rule.join(" ")),
        );
    }
    if good {
        findings.ok(WHAT, format!("{who} may use all {} commands on all keys", rights::COMMANDS.len()));
    }
    Ok(good)
}
