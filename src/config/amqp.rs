//! Where messages come from and go to in RabbitMQ: an AMQP URL (<https://www.rabbitmq.com/docs/uri-spec>) with our parameters.

use std::collections::BTreeMap;
use std::fmt;

use percent_encoding::percent_decode_str;
use url::{Host, Url};

use super::read::Wrong;
use super::url::{CaFile, redacted, redacted_display};

/// The longest name of a queue or an exchange in AMQP, in bytes.
const MAX_NAME: usize = 255;
const RIGHT: &str =
    "write amqp://user:password@host:5672/vhost, or amqps:// for TLS; percent-encode special characters";

/// A RabbitMQ server, and who we are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmqpServer {
    url: AmqpUrl,
    ca: Option<CaFile>,
}

/// The URL. `Display` and `Debug` hide its password.
#[derive(Clone, PartialEq, Eq)]
struct AmqpUrl(Url);

impl AmqpUrl {
    fn expose(&self) -> &str {
        self.0.as_str()
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

impl AmqpServer {
    /// The server, and the parameters that are not its own.
    fn parse(text: &str) -> Result<(Self, BTreeMap<String, String>), Wrong> {
        let url = Url::parse(text)
            .map_err(|error| Wrong::new(format!("is not a URL ({error}; its value is not shown)"), RIGHT))?;
        if !matches!(url.scheme(), "amqp" | "amqps") {
            return Err(Wrong::new("is neither amqp:// nor amqps://", RIGHT));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(Wrong::new("names no host", RIGHT));
        }
        if url.path().trim_start_matches('/').contains('/') {
            return Err(Wrong::new("has a / in its virtual host", "write %2F for a / in the name"));
        }
        let mut parameters = BTreeMap::new();
        for (name, value) in url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())) {
            if parameters.insert(name.clone(), value).is_some() {
                return Err(Wrong::new(format!("has {name:.30} twice"), "remove one of them"));
            }
        }
        let ca = match parameters.remove("cacertfile") {
            Some(path) => CaFile::parse(&path)?,
            None => None,
        };
        if ca.is_some() && url.scheme() == "amqp" {
            return Err(Wrong::new("has cacertfile, but amqp:// does not use TLS", "write amqps://"));
        }
        let server = Self { url: AmqpUrl(url), ca };
        if server.vhost().len() > MAX_NAME {
            return Err(Wrong::new("has a virtual host that is longer than 255 bytes", RIGHT));
        }
        Ok((server, parameters))
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.url.0.scheme() == "amqps"
    }

    /// The authorities to trust; `None` for those of the machine.
    #[must_use]
    pub fn ca(&self) -> Option<&CaFile> {
        self.ca.as_ref()
    }

    /// The host; an IPv6 address without brackets.
    #[must_use]
    pub fn host(&self) -> String {
        match self.url.0.host() {
            Some(Host::Ipv6(address)) => address.to_string(),
            Some(host) => host.to_string(),
            None => String::new(),
        }
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.url.0.port().unwrap_or(if self.is_tls() { 5671 } else { 5672 })
    }

    /// The user; RabbitMQ's own default if there is none.
    #[must_use]
    pub fn user(&self) -> String {
        match self.url.0.username() {
            "" => "guest".to_owned(),
            user => decoded(user),
        }
    }

    /// The password; never log it.
    #[must_use]
    pub fn password(&self) -> String {
        self.url.0.password().map_or_else(|| "guest".to_owned(), decoded)
    }

    /// The virtual host.
    #[must_use]
    pub fn vhost(&self) -> String {
        match self.url.0.path().trim_start_matches('/') {
            "" => "/".to_owned(),
            name => decoded(name),
        }
    }
}

fn name(value: Option<String>, parameter: &str, right: &str) -> Result<String, Wrong> {
    match value {
        Some(name) if !name.is_empty() && name.len() <= MAX_NAME => Ok(name),
        Some(_) => {
            Err(Wrong::new(format!("has a {parameter} that is not 1 to {MAX_NAME} bytes long"), right))
        }
        None => Err(Wrong::new(format!("has no {parameter}"), right)),
    }
}

fn nothing_else(left: &BTreeMap<String, String>, right: &str) -> Result<(), Wrong> {
    match left.keys().next() {
        Some(unknown) => Err(Wrong::new(format!("has the unknown parameter {unknown:.30}"), right)),
        None => Ok(()),
    }
}

/// A queue to take events from. `Display` and `Debug` hide the password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmqpOrigin {
    /// The server.
    pub server: AmqpServer,
    /// The queue.
    pub queue: String,
    /// The maximum number of unacknowledged messages.
    pub prefetch: u16,
}

impl AmqpOrigin {
    const MOST: u16 = 10_000;

    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        const RIGHT: &str =
            "end it with ?queue=NAME, or ?queue=NAME&prefetch=500; also cacertfile=PATH with amqps://";
        let (server, mut given) = AmqpServer::parse(text)?;
        let queue = name(given.remove("queue"), "queue", RIGHT)?;
        let prefetch = match given.remove("prefetch") {
            None => 500,
            Some(text) => text
                .parse()
                .ok()
                .filter(|count| (1..=Self::MOST).contains(count))
                .ok_or_else(|| Wrong::new("has a prefetch that is not 1 to 10000", RIGHT))?,
        };
        nothing_else(&given, RIGHT)?;
        Ok(Self { server, queue, prefetch })
    }
}

/// What a message is routed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingKey {
    /// The account, so that all of its events go the same way.
    Did,
    /// The collection; `identity` and `account` for such events.
    Collection,
}

/// An exchange to publish to. `Display` and `Debug` hide the password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmqpOutput {
    /// The server.
    pub server: AmqpServer,
    /// The exchange.
    pub exchange: String,
    /// What a message is routed by.
    pub key: RoutingKey,
}

impl AmqpOutput {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        const RIGHT: &str = "end it with ?exchange=NAME, or ?exchange=NAME&key=did (or collection); also cacertfile=PATH with amqps://";
        let (server, mut given) = AmqpServer::parse(text)?;
        let exchange = name(given.remove("exchange"), "exchange", RIGHT)?;
        let key = match given.remove("key").as_deref() {
            None | Some("did") => RoutingKey::Did,
            Some("collection") => RoutingKey::Collection,
            Some(_) => return Err(Wrong::new("has a key that is neither did nor collection", RIGHT)),
        };
        nothing_else(&given, RIGHT)?;
        Ok(Self { server, exchange, key })
    }
}

redacted_display!(AmqpUrl);

macro_rules! display_url {
    ($($name:ident)*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.server.url.fmt(f)
            }
        }
    )*};
}

display_url!(AmqpOrigin AmqpOutput);
