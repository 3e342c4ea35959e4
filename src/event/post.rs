//! The fields of a post.

use std::borrow::Cow;
use std::io::{self, Write};

use super::Json;

/// What a post's row holds besides the fields of its operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Post<'a> {
    /// The text, without U+0000.
    pub text: Cow<'a, str>,
    /// The URI of the post that it replies to.
    pub parent_uri: Option<Cow<'a, str>>,
    /// That post's CID.
    pub parent_cid: Option<Cow<'a, str>>,
    /// The CID of its thread's root.
    pub root_cid: Option<Cow<'a, str>>,
    /// Pictures, videos, links, quoted records.
    pub embed: Option<Json<'a>>,
    /// Languages.
    pub langs: Option<Json<'a>>,
    /// Tags besides those in the text.
    pub tags: Option<Json<'a>>,
    /// Links, mentions and tags in the text.
    pub facets: Option<Json<'a>>,
    /// The values of the labels that it has of its own.
    pub labels: Vec<String>,
}

impl Post<'_> {
    /// The same without borrowing.
    #[must_use]
    pub fn into_owned(self) -> Post<'static> {
        let own = |text: Option<Cow<'_, str>>| text.map(|text| Cow::Owned(text.into_owned()));
        let json = |json: Option<Json<'_>>| json.map(|json| Json(Cow::Owned(json.0.into_owned())));
        Post {
            text: Cow::Owned(self.text.into_owned()),
            parent_uri: own(self.parent_uri),
            parent_cid: own(self.parent_cid),
            root_cid: own(self.root_cid),
            embed: json(self.embed),
            langs: json(self.langs),
            tags: json(self.tags),
            facets: json(self.facets),
            labels: self.labels,
        }
    }

    /// Writes it as the JSON that `standpipe.put_post` takes. `root_uri`: its thread's root.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn write_json(&self, root_uri: Option<&str>, mut out: impl Write) -> io::Result<()> {
        out.write_all(b"{\"text\":")?;
        serde_json::to_writer(&mut out, &self.text)?;
        let texts = [
            ("parent_uri", self.parent_uri.as_deref()),
            ("parent_cid", self.parent_cid.as_deref()),
            ("root_uri", root_uri),
            ("root_cid", self.root_cid.as_deref()),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                write!(out, ",\"{name}\":")?;
                serde_json::to_writer(&mut out, text)?;
            }
        }
        let values =
            [("embed", &self.embed), ("langs", &self.langs), ("tags", &self.tags), ("facets", &self.facets)];
        for (name, value) in values {
            if let Some(Json(value)) = value {
                write!(out, ",\"{name}\":{value}")?;
            }
        }
        if !self.labels.is_empty() {
            out.write_all(b",\"labels\":")?;
            serde_json::to_writer(&mut out, &self.labels)?;
        }
        out.write_all(b"}")
    }
}
