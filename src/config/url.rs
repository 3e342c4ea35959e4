//! Addresses and secrets, redacted when printed.

use std::fmt;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use url::Url;

use super::read::Wrong;

/// The path at which a relay serves its event stream (AT Protocol, `com.atproto.sync.subscribeRepos`).
pub(super) const SUBSCRIBE_PATH: &str = "/xrpc/com.atproto.sync.subscribeRepos";

/// What the URL of a Jetstream may not have, and why.
const JETSTREAM_OPTIONS: &[(&str, &str)] = &[
    ("wantedCollections", "comes from COLLECTIONS"),
    ("wantedDids", "comes from WANTED_DIDS"),
    ("requireHello", "is added where it is needed"),
];

fn is_jetstream(url: &Url) -> bool {
    url.path().trim_end_matches('/').ends_with("/subscribe")
}

/// The relay's WebSocket URL. `Display` and `Debug` hide what may be secret in it.
#[derive(Clone, PartialEq, Eq)]
pub struct RelayUrl(Url);

impl RelayUrl {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write wss://host, or ws:// for a relay without TLS";
        let mut url = Url::parse(text)
            .map_err(|error| Wrong::new(format!("is not a URL ({error}; its value is not shown)"), right))?;
        if !matches!(url.scheme(), "ws" | "wss") {
            return Err(Wrong::new("is neither ws:// nor wss://", right));
        }
        if url.query_pairs().any(|(name, _)| name == "cursor") {
            let what = "has a cursor of its own, but the cursor is kept in Redis";
            return Err(Wrong::new(what, "remove the cursor from the URL"));
        }
        if is_jetstream(&url) {
            for (name, what) in JETSTREAM_OPTIONS {
                if url.query_pairs().any(|(given, _)| given == *name) {
                    return Err(Wrong::new(format!("has {name}, which {what}"), "remove it from the URL"));
                }
            }
        }
        if url.path() == "/" {
            url.set_path(SUBSCRIBE_PATH);
        }
        url.set_fragment(None);
        Ok(Self(url))
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.0.scheme() == "wss"
    }

    /// The URL with its secrets, to connect with; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }

    /// Where it answers HTTP requests, without a `/` at the end.
    #[must_use]
    pub fn http(&self) -> String {
        let scheme = if self.is_tls() { "https" } else { "http" };
        format!("{scheme}://{}", self.host_and_port())
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &str {
        self.0.host_str().unwrap_or_default()
    }

    /// Whether it is a Jetstream, by its path.
    #[must_use]
    pub fn is_jetstream(&self) -> bool {
        is_jetstream(&self.0)
    }

    /// Whether it was asked to compress its messages.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.is_jetstream() && self.0.query_pairs().any(|(name, value)| name == "compress" && value == "true")
    }

    /// The relay's name, `host` or `host:port`, and for a Jetstream `/subscribe` after it: sequence numbers are meaningful only
    /// together with it. The scheme's default port is left out.
    #[must_use]
    pub fn relay(&self) -> String {
        let path = if self.is_jetstream() { "/subscribe" } else { "" };
        format!("{}{path}", self.host_and_port())
    }

    fn host_and_port(&self) -> String {
        let host = self.0.host_str().unwrap_or_default();
        match self.0.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }
}

/// The URL of the directory of did:plc. `Display` and `Debug` hide what may be secret in it.
#[derive(Clone, PartialEq, Eq)]
pub struct PlcUrl(Url);

impl PlcUrl {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write https://host, or http:// for a directory without TLS";
        let url = Url::parse(text)
            .map_err(|error| Wrong::new(format!("is not a URL ({error}; its value is not shown)"), right))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            return Err(Wrong::new("is neither http:// nor https:// with a host", right));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(Wrong::new("has a query or a fragment", right));
        }
        Ok(Self(url))
    }

    /// The URL with its secrets; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> String {
        self.0.host_str().unwrap_or_default().to_owned()
    }
}

/// The URL of Redis. `Display` and `Debug` hide its password.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(String);

impl RedisUrl {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write redis://:password@host:6379, rediss:// for TLS, or unix:///path for a socket";
        let url = Url::parse(text).map_err(|error| {
            let what = format!("is not a URL ({error}; its value is not shown)");
            Wrong::new(what, format!("{right}; percent-encode special characters of the password"))
        })?;
        match url.scheme() {
            "redis" | "rediss" | "valkey" | "valkeys" => {
                if url.host_str().is_none_or(str::is_empty) {
                    return Err(Wrong::new("names no host", right));
                }
                let database = url.path().trim_start_matches('/');
                if !database.is_empty() && database.parse::<u32>().is_err() {
                    let what = "has a path that is not a database number";
                    return Err(Wrong::new(what, "end it with /0, or with nothing"));
                }
            }
            "unix" | "redis+unix" | "valkey+unix" => {
                if url.host_str().is_some_and(|host| !host.is_empty()) || url.path().len() < 2 {
                    return Err(Wrong::new(
                        "names no socket",
                        "write unix:///run/redis.sock, with three slashes",
                    ));
                }
            }
            _ => return Err(Wrong::new("has a scheme that is not one of Redis", right)),
        }
        Ok(Self(text.to_owned()))
    }

    /// The URL with its password, to connect with; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it asks for TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.0.starts_with("rediss:") || self.0.starts_with("valkeys:")
    }
}

/// Certificates of authorities, read from a file.
#[derive(Clone, PartialEq, Eq)]
pub struct CaFile {
    path: String,
    pem: Vec<u8>,
}

/// Its path.
impl fmt::Display for CaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl fmt::Debug for CaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CaFile({:?})", self.path)
    }
}

impl CaFile {
    /// `None` for libpq's word for the system's own.
    pub(super) fn parse(text: &str) -> Result<Option<Self>, Wrong> {
        let right = "write the path of a PEM file, such as /etc/ssl/certs/our-ca.pem";
        if text.is_empty() || text == "system" {
            return Ok(None);
        }
        let pem = std::fs::read(text).map_err(|error| {
            Wrong::new(format!("names a certificate file that cannot be read ({})", error.kind()), right)
        })?;
        let count = CertificateDer::pem_slice_iter(&pem).flatten().count();
        if count == 0 {
            return Err(Wrong::new("names a file without any certificate in PEM form", right));
        }
        Ok(Some(Self { path: text.to_owned(), pem }))
    }

    /// The file's content.
    #[must_use]
    pub fn pem(&self) -> &[u8] {
        &self.pem
    }
}

/// A secret that a client shows. `Display` and `Debug` hide it.
#[derive(Clone)]
pub struct AccessToken(String);

impl AccessToken {
    /// A shorter token could be guessed.
    const MIN_LENGTH: usize = 16;

    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write 16 characters or more, such as what `openssl rand -hex 24` prints";
        if text.len() < Self::MIN_LENGTH {
            return Err(Wrong::new("is too short (its value is not shown)", right));
        }
        // It is sent in a header.
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Wrong::new(
                "has a character that a header cannot carry (its value is not shown)",
                "write ASCII letters, digits and punctuation",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether this is the token. Takes constant time, so that it does not reveal how much of the token is right.
    #[must_use]
    pub fn is(&self, given: &str) -> bool {
        use subtle::ConstantTimeEq as _;
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }

    /// The token, to send it; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(***)")
    }
}

macro_rules! redacted_display {
    ($($url:ident)*) => {$(
        impl fmt::Display for $url {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&redacted(self.expose()))
            }
        }

        impl fmt::Debug for $url {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($url), "({})"), redacted(self.expose()))
            }
        }
    )*};
}

pub(super) use redacted_display;

redacted_display!(RelayUrl PlcUrl RedisUrl);

/// `scheme://user:***@host/path?parameter=value`, with `***` for whatever may be secret. It works on any
/// text: if the parts cannot be told apart, it hides too much rather than too little.
pub(super) fn redacted(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return "***".to_owned();
    };
    // The last @, since a password may contain others.
    let (user_info, rest) = match rest.rsplit_once('@') {
        Some((user_info, rest)) => (Some(user_info), rest),
        None => (None, rest),
    };
    let user_info = match user_info {
        None => String::new(),
        Some(text) if text.contains(['/', '?', '#']) => return format!("{scheme}://***"),
        Some(text) => match text.split_once(':') {
            Some((user, _)) => format!("{user}:***@"),
            // For PostgreSQL, a name alone is a user; for Redis, it is usually a misplaced password.
            None if scheme.starts_with("postgres") => format!("{text}@"),
            None => "***@".to_owned(),
        },
    };
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    // What RabbitMQ routes by.
    let is_amqp = matches!(scheme, "amqp" | "amqps");
    let query = query.map_or_else(String::new, |query| {
        let shown = query.split('&').map(|parameter| match parameter.split_once('=') {
            Some(("key", _)) if is_amqp => parameter.to_owned(),
            Some((name, _)) if hides(name) => format!("{name}=***"),
            Some(_) => parameter.to_owned(),
            None => "***".to_owned(),
        });
        format!("?{}", shown.collect::<Vec<_>>().join("&"))
    });
    format!("{scheme}://{user_info}{path}{query}")
}

/// Whether a parameter of this name may hold a secret: `password`, `pass` (Redis sockets), `sslpassword`,
/// `token`, or a name in disguise.
fn hides(parameter: &str) -> bool {
    let name = parameter.to_ascii_lowercase();
    ["pass", "secret", "token", "key", "%"].iter().any(|part| name.contains(part))
}
