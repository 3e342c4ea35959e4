//! The address of PostgreSQL, in libpq's syntax.

use std::fmt;

use super::read::Wrong;
use super::url::{redacted, redacted_display};

/// The URL of PostgreSQL, as given. `Display` and `Debug` hide its password.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// libpq's spellings. The client library knows only three of them; the store translates.
    pub(super) const SSL_MODES: [&str; 6] =
        ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

    /// The parameters that the client library knows, and those that are translated for it.
    const PARAMETERS: [&str; 21] = [
        "user",
        "password",
        "dbname",
        "options",
        "application_name",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
        "host",
        "hostaddr",
        "port",
        "connect_timeout",
        "tcp_user_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_retries",
        "target_session_attrs",
        "channel_binding",
        "load_balance_hosts",
        "schema",
    ];

    /// The remedy for parameters that other libraries know.
    fn instead_of(parameter: &str) -> &'static str {
        match parameter {
            "ssl" => "write sslmode=require, or sslmode=disable",
            "currentSchema" | "search_path" => "write schema=NAME",
            "pgbouncer" | "statement_cache_size" | "prepared_statements" | "binary_parameters" => {
                "remove it: a pooler works in session mode, and needs no parameter here"
            }
            "connection_limit" | "pool_max_conns" | "pool_size" | "max_connections" | "pool_timeout" => {
                "remove it: DB_POOL_SIZE limits the connections"
            }
            "statement_timeout" => "remove it: DB_STATEMENT_TIMEOUT limits each statement",
            "sslcert" | "sslkey" | "sslpassword" | "sslidentity" => {
                "remove it: client certificates are not supported; use a password"
            }
            "gssencmode" | "krbsrvname" | "gsslib" => "remove it: GSSAPI is not supported; sslmode encrypts",
            "timezone" | "TimeZone" | "client_encoding" | "charset" => {
                "remove it: standpipe sets what it needs"
            }
            "ssl_mode" | "sslMode" => "write sslmode=...",
            _ => "remove it, or set it in options, such as options=-c%20work_mem%3D16MB",
        }
    }

    /// Checks what `url::Url` cannot: PostgreSQL's URLs may name several hosts, or name one only in a parameter.
    /// Splits the parts as the client library does.
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write postgres://user:password@host:5432/database";
        let hidden = |what: &str| Wrong::new(format!("{what} (its value is not shown)"), right);
        let Some(rest) = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"))
        else {
            return Err(hidden("does not start with postgres:// or postgresql://"));
        };
        let (user_info, rest) = match rest.split_once('@') {
            Some((user_info, rest)) => (user_info, rest),
            None => ("", rest),
        };
        let user = user_info.split(':').next().unwrap_or_default();
        let (hosts, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        if hosts.contains('@') || user.contains(['/', '?', '#']) {
            return Err(Wrong::new(
                "has a misplaced @ or / (its value is not shown)",
                "percent-encode special characters of the password: %40 for @, %2F for /",
            ));
        }
        let parameters = rest.split_once('?').map_or("", |(_, parameters)| parameters);
        let parameters: Vec<_> = parameters
            .split('&')
            .filter(|p| !p.is_empty())
            .map(|p| p.split_once('=').unwrap_or((p, "")))
            .collect();
        if hosts.is_empty() {
            if !parameters.iter().any(|(name, _)| matches!(*name, "host" | "hostaddr")) {
                return Err(hidden("names no host"));
            }
        } else if !hosts.split(',').all(is_host_and_port) {
            return Err(hidden("has an invalid host or port"));
        }
        for (name, value) in &parameters {
            let translated = *name == "ssl" && matches!(*value, "true" | "1" | "false" | "0");
            if !translated && !Self::PARAMETERS.contains(name) {
                let name: String = name.chars().filter(|c| !c.is_control()).take(40).collect();
                return Err(Wrong::new(
                    format!("has the parameter {name}, which standpipe does not know (the URL is not shown)"),
                    Self::instead_of(&name),
                ));
            }
        }
        if parameters.iter().any(|(name, mode)| *name == "sslmode" && !Self::SSL_MODES.contains(mode)) {
            let right = format!("write one of {}", Self::SSL_MODES.join(", "));
            return Err(Wrong::new("has an sslmode that PostgreSQL does not know", right));
        }
        Ok(Self(text.to_owned()))
    }

    /// The URL with its password, to connect with; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    fn parameters(&self) -> impl Iterator<Item = (&str, &str)> {
        let parameters = self.0.split_once('?').map_or("", |(_, parameters)| parameters);
        parameters.split('&').filter_map(|parameter| parameter.split_once('='))
    }

    /// The last `sslmode` that it gives, which is the one that counts.
    #[must_use]
    pub fn ssl_mode(&self) -> Option<&str> {
        let words = self.parameters().filter_map(|parameter| match parameter {
            ("sslmode", mode) => Some(mode),
            ("ssl", "true" | "1") => Some("require"),
            ("ssl", _) => Some("disable"),
            _ => None,
        });
        words.last()
    }

    /// The schema of the application's tables, where the URL names one.
    #[must_use]
    pub fn schema(&self) -> Option<String> {
        let (_, schema) = self.parameters().filter(|(name, _)| *name == "schema").last()?;
        let schema = schema.replace('+', "%2B");
        let decoded = url::form_urlencoded::parse(schema.as_bytes()).next()?.0.into_owned();
        (!decoded.is_empty()).then_some(decoded)
    }

    /// The file of certificates that a URL names, if it is one that can be used.
    pub(super) fn root_cert_of(text: &str) -> Option<String> {
        Self::parse(text).ok()?.root_cert()
    }

    fn root_cert(&self) -> Option<String> {
        let (_, path) = self.parameters().filter(|(name, _)| *name == "sslrootcert").last()?;
        // Decoded like a query value, except for the plus sign, which libpq leaves alone.
        let path = path.replace('+', "%2B");
        let decoded = url::form_urlencoded::parse(path.as_bytes()).next()?.0.into_owned();
        (!decoded.is_empty()).then_some(decoded)
    }

    /// The URL in the syntax of the client library, which knows only three modes and no certificate file:
    /// [`DatabaseUrl::ssl_mode`] determines the checks of TLS. With the password; never log it.
    #[must_use]
    pub fn for_driver(&self) -> String {
        let Some((url, parameters)) = self.0.split_once('?') else { return self.0.clone() };
        let kept: Vec<String> = parameters
            .split('&')
            .filter(|parameter| !parameter.starts_with("sslrootcert=") && !parameter.starts_with("schema="))
            .map(|parameter| match parameter {
                "sslmode=allow" => "sslmode=prefer".to_owned(),
                "sslmode=verify-ca" | "sslmode=verify-full" | "ssl=true" | "ssl=1" => {
                    "sslmode=require".to_owned()
                }
                "ssl=false" | "ssl=0" => "sslmode=disable".to_owned(),
                _ => parameter.to_owned(),
            })
            .collect();
        if kept.is_empty() { url.to_owned() } else { format!("{url}?{}", kept.join("&")) }
    }
}

redacted_display!(DatabaseUrl);

/// `name`, `name:5432`, `1.2.3.4`, `[::1]:5432`, or a percent-encoded directory of sockets.
fn is_host_and_port(text: &str) -> bool {
    let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
        let Some((address, rest)) = bracketed.split_once(']') else {
            return false;
        };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => ("v6", Some(port)),
            None if rest.is_empty() => ("v6", None),
            None => return false,
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    !host.is_empty()
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._%".contains(&b))
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}
