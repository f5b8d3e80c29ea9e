//! Configuration: `default.toml` ← file ← environment, with every mistake reported at once.
//!
//! A program's `default.toml` documents every key and is compiled in. A file may change what stands there;
//! a key that does not stand there is refused, with the nearest one that does. `TAILRACE_CLOUD__SERVE__PG_PORT`
//! sets `serve.pg_port` when the prefix is `TAILRACE_CLOUD`. Arrays of tables (`[[device]]`) are lists of
//! the user's own: `default.toml` has them empty, their elements are checked by the type that reads them.
//!
//! Settings are parsed twice: into the plain structs that mirror the file, then by each program into the
//! validated values that it uses. [`Mistakes`] gathers what both find.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::{Deserialize, de::DeserializeOwned};
use toml::{Table, Value};

/// One thing that is wrong with a configuration, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Dotted path of the key, such as `mqtt.keep_alive`.
    pub key: String,
    /// What is wrong, with the value; lower case, no full stop.
    pub problem: String,
    /// What to do about it.
    pub fix: String,
}

/// Everything that is wrong with a configuration. Never empty inside an `Err`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mistakes {
    /// Where the configuration came from.
    pub origin: String,
    /// In the order of finding.
    pub list: Vec<Mistake>,
}

impl Mistakes {
    /// An empty list for a configuration that came from `origin`.
    pub fn of(origin: impl Into<String>) -> Self {
        Self { origin: origin.into(), list: Vec::new() }
    }

    /// Notes a mistake.
    pub fn add(&mut self, key: impl Into<String>, problem: impl Into<String>, fix: impl Into<String>) {
        self.list.push(Mistake { key: key.into(), problem: problem.into(), fix: fix.into() });
    }

    /// Notes a mistake unless `ok`.
    pub fn require(&mut self, ok: bool, key: &str, problem: impl fmt::Display, fix: &str) {
        if !ok {
            self.add(key, problem.to_string(), fix);
        }
    }

    /// `Ok` when nothing was noted.
    pub fn into_result<T>(self, value: T) -> Result<T, Mistakes> {
        if self.list.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}:", if self.list.len() == 1 { "a mistake" } else { "mistakes" }, self.origin)?;
        for Mistake { key, problem, fix } in &self.list {
            write!(f, "\n  {key}: {problem}; {fix}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// Where a configuration comes from.
pub struct Layers<'a> {
    /// The program's documented defaults.
    pub defaults: &'a str,
    /// The user's file, if any.
    pub file: Option<&'a Path>,
    /// `TAILRACE_EDGE` or `TAILRACE_CLOUD`.
    pub env_prefix: &'a str,
}

/// Merges the layers and reads them as `T`, whose structs mirror `default.toml`.
///
/// # Errors
/// All mistakes that can be seen at this stage.
pub fn load<T: DeserializeOwned>(layers: &Layers<'_>) -> Result<T, Mistakes> {
    load_with_env(layers, std::env::vars())
}

/// [`load`] with a given environment.
///
/// # Errors
/// All mistakes that can be seen at this stage.
pub fn load_with_env<T: DeserializeOwned>(
    layers: &Layers<'_>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<T, Mistakes> {
    let origin = layers.file.map_or_else(|| "the environment".to_owned(), |p| p.display().to_string());
    let mut mistakes = Mistakes::of(origin);
    let mut merged: Table = layers.defaults.parse().expect("default.toml is valid (tested)");
    if let Some(path) = layers.file {
        match read_table(path) {
            Ok(table) => merge(&mut merged, table, "", &mut mistakes),
            Err(problem) => mistakes.add("file", problem, "correct the file, or give another with --config"),
        }
    }
    // Sorted, so that mistakes come in the same order every time.
    for (name, text) in env.into_iter().collect::<BTreeMap<_, _>>() {
        if let Some(path) = name.strip_prefix(layers.env_prefix).and_then(|n| n.strip_prefix("__")) {
            override_from_env(&mut merged, &name, path, &text, &mut mistakes);
        }
    }
    if !mistakes.list.is_empty() {
        return Err(mistakes);
    }
    match merged.try_into() {
        Ok(settings) => Ok(settings),
        Err(e) => {
            mistakes.add("value", e.to_string().trim_end().replace('\n', " "), "see default.toml");
            Err(mistakes)
        }
    }
}

fn read_table(path: &Path) -> Result<Table, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    text.parse::<Table>().map_err(|e| {
        let line = e.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        format!("line {line} is not TOML: {}", e.message())
    })
}

/// Lays `over` onto `base`, which knows all keys and their types.
fn merge(base: &mut Table, over: Table, prefix: &str, mistakes: &mut Mistakes) {
    for (key, value) in over {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        let Some(known) = base.get_mut(&key) else {
            let fix = match nearest(&key, base.keys()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("known here: {}", base.keys().cloned().collect::<Vec<_>>().join(", ")),
            };
            mistakes.add(path, "unknown key", fix);
            continue;
        };
        match (known, value) {
            // An empty table in default.toml is a map with keys of the user's own.
            (Value::Table(known), Value::Table(value)) if known.is_empty() => *known = value,
            (Value::Table(known), Value::Table(value)) => merge(known, value, &path, mistakes),
            (Value::Float(known), Value::Integer(value)) => *known = value as f64,
            (known, value) if known.same_type(&value) => *known = value,
            (known, value) => mistakes.add(
                path,
                format!("{} is {}", value.to_string().trim(), article(value.type_str())),
                format!("write {}, such as {}", article(known.type_str()), known.to_string().trim()),
            ),
        }
    }
}

fn article(type_name: &str) -> String {
    let an = type_name.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {type_name}", if an { "an" } else { "a" })
}

fn override_from_env(merged: &mut Table, name: &str, path: &str, text: &str, mistakes: &mut Mistakes) {
    let keys: Vec<String> = path.split("__").map(str::to_ascii_lowercase).collect();
    let Some((last, parents)) = keys.split_last() else { return };
    let table = parents.iter().try_fold(&mut *merged, |t, key| t.get_mut(key)?.as_table_mut());
    let Some(known) = table.and_then(|t| t.get_mut(last)) else {
        return mistakes.add(
            name,
            format!("no such key {}", keys.join(".")),
            "see default.toml for the keys",
        );
    };
    let value = match known {
        Value::String(_) => Some(Value::String(text.to_owned())),
        // Everything else is written as in TOML.
        _ => format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v")),
    };
    match (known, value) {
        (Value::Float(known), Some(Value::Integer(value))) => *known = value as f64,
        (known, Some(value)) if known.same_type(&value) => *known = value,
        (known, _) => mistakes.add(
            name,
            format!("{text:?} is not {}", article(known.type_str())),
            format!("write it as in TOML, such as {}", known.to_string().trim()),
        ),
    }
}

/// The known key that a mistyped one was most likely meant to be.
fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a String> {
    known.map(|k| (edit_distance(key, k), k)).min().filter(|(d, k)| *d <= 1 + k.len() / 4).map(|(_, k)| k)
}

/// Levenshtein's distance, one row at a time.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.bytes().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// A secret by reference: `file:/run/secrets/mqtt` or `env:MQTT_PASSWORD`; empty for none. The secret itself
/// never stands in a configuration, and the reference prints without it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretRef(String);

impl From<&str> for SecretRef {
    fn from(reference: &str) -> Self {
        Self(reference.to_owned())
    }
}

impl SecretRef {
    /// Whether a secret is configured.
    pub fn is_set(&self) -> bool {
        !self.0.is_empty()
    }

    /// Fetches the secret; a trailing line break is not part of it.
    ///
    /// # Errors
    /// Says which reference cannot be resolved, never what it holds.
    pub fn resolve(&self) -> anyhow::Result<Option<String>> {
        if !self.is_set() {
            return Ok(None);
        }
        let secret = if let Some(path) = self.0.strip_prefix("file:") {
            std::fs::read_to_string(path)
                .map_err(|e| anyhow::anyhow!("cannot read the secret file {path}: {e}"))?
        } else if let Some(name) = self.0.strip_prefix("env:") {
            std::env::var(name)
                .map_err(|e| anyhow::anyhow!("environment variable {name} for a secret: {e}"))?
        } else {
            anyhow::bail!("a secret stands in the configuration itself; write file:PATH or env:NAME instead");
        };
        Ok(Some(secret.trim_end_matches(['\r', '\n']).to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: &str = "site = \"\"\nratio = 0.5\n[mqtt]\nurl = \"mqtt://127.0.0.1:1883\"\nport = 1883\n[serve]\nlimits = {}\n";

    #[derive(Debug, Deserialize)]
    struct Settings {
        site: String,
        ratio: f64,
        mqtt: Mqtt,
        serve: Serve,
    }
    #[derive(Debug, Deserialize)]
    struct Mqtt {
        url: String,
        port: u16,
    }
    #[derive(Debug, Deserialize)]
    struct Serve {
        limits: BTreeMap<String, i64>,
    }

    fn check(file: &str, env: &[(&str, &str)]) -> Result<Settings, Mistakes> {
        let path = std::env::temp_dir().join(format!("tailrace-config-{}.toml", uuid::Uuid::now_v7()));
        std::fs::write(&path, file).unwrap();
        let layers = Layers { defaults: DEFAULTS, file: Some(&path), env_prefix: "TAILRACE_X" };
        let loaded =
            load_with_env(&layers, env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        std::fs::remove_file(path).unwrap();
        loaded
    }

    #[test]
    fn layers_override_in_order() {
        let settings = check(
            "site = \"a\"\nratio = 1\n[mqtt]\nport = 1884\n[serve.limits]\nrows = 7",
            &[("TAILRACE_X__MQTT__PORT", "1885"), ("TAILRACE_Y__SITE", "z")],
        )
        .unwrap();
        assert_eq!((settings.site.as_str(), settings.ratio, settings.mqtt.port), ("a", 1.0, 1885));
        assert_eq!(settings.mqtt.url, "mqtt://127.0.0.1:1883");
        assert_eq!(settings.serve.limits["rows"], 7);
    }

    #[test]
    fn all_mistakes_come_at_once_each_with_its_fix() {
        let mistakes = check(
            "sit = \"a\"\n[mqtt]\nport = \"1884\"\nurll = 1",
            &[("TAILRACE_X__MQTT__PORT", "many"), ("TAILRACE_X__NOPE", "1")],
        )
        .unwrap_err();
        let text = mistakes.to_string();
        assert_eq!(mistakes.list.len(), 5, "{text}");
        for part in [
            "sit: unknown key; did you mean site?",
            "mqtt.port: \"1884\" is a string; write an integer, such as 1883",
            "mqtt.urll: unknown key; did you mean url?",
            "TAILRACE_X__MQTT__PORT: \"many\" is not an integer",
            "TAILRACE_X__NOPE: no such key nope",
        ] {
            assert!(text.contains(part), "{part:?} not in {text}");
        }
    }

    #[test]
    fn broken_toml_names_its_line() {
        let text = check("site = \"a\"\nport = = 3", &[]).unwrap_err().to_string();
        assert!(text.contains("line 2 is not TOML"), "{text}");
    }

    #[test]
    fn a_value_out_of_range_is_a_mistake() {
        let text = check("[mqtt]\nport = 70000", &[]).unwrap_err().to_string();
        assert!(text.contains("70000"), "{text}");
    }

    #[test]
    fn a_secret_is_a_reference() {
        let error = SecretRef("hunter2".into()).resolve().unwrap_err().to_string();
        assert!(!error.contains("hunter2") && error.contains("file:PATH"), "{error}");
        assert_eq!(SecretRef::default().resolve().unwrap(), None);
    }
}
