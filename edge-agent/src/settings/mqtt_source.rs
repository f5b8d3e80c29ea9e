//! From `[[mqtt_source]]` as typed to topics of a broker.

use std::{collections::BTreeMap, time::Duration};

use common::{config::Mistakes, topic_filter};
use sha2::{Digest, Sha256};

use super::{
    JsonTopic, MqttSettings, NameAt, Source, Target, Whose,
    check::{Binding, at_least, check_broker},
    file,
};

/// What is older is taken for the work of a clock that was reset.
const MAX_AGE: Duration = Duration::from_secs(30 * 86_400);
const MINUTE: Duration = Duration::from_secs(60);

pub(super) fn check(
    entry: file::MqttSource,
    name: String,
    (uplink, root): (&MqttSettings, &str),
    bind: &mut Binding<'_>,
    m: &mut Mistakes,
) -> Source {
    let own = format!("mqtt_source {:?}", entry.url);
    let key = |field: &str| format!("{own} {field}");
    let (host, port, tls) = check_broker(key, &entry.url, &entry.password, &entry.ca, m);
    let no_ca = entry.ca.as_os_str().is_empty();
    let ca = (!no_ca).then_some(entry.ca);
    let (username, password) = (entry.username, entry.password);
    let broker = MqttSettings { host, port, tls, username, password, ca, ..uplink.clone() };
    m.require(!entry.topic.is_empty(), &own, "nothing is read there", "add an [[mqtt_source.topic]]");
    let filters: Vec<String> = entry.topic.iter().map(|topic| topic.filter.clone()).collect();
    for (i, filter) in filters.iter().enumerate() {
        let key = key(&format!("filter {filter:?}"));
        let other =
            filters[..i].iter().find(|other| *other != filter && topic_filter::overlap(other, filter));
        let problem = format!("it meets {:?}", other.map_or("", String::as_str));
        m.require(
            other.is_none(),
            &key,
            problem,
            "a message could come twice; write the same filter in both",
        );
        let home = (&broker.host, broker.port) == (&uplink.host, uplink.port);
        let echo = home && topic_filter::overlap(filter, &format!("{root}/#"));
        m.require(!echo, &key, format!("the agent itself writes under {root}"), "narrow it");
    }
    let topics = entry.topic.into_iter().filter_map(|topic| check_topic(topic, &own, bind, m)).collect();
    // A session that was made for other filters would go on receiving by them.
    let client_id = format!("{name}-{:.8}", format!("{:x}", Sha256::digest(filters.join("\n"))));
    Source::Mqtt { url: entry.url, broker, client_id, topics }
}

fn check_topic(
    entry: file::JsonTopic,
    source: &str,
    bind: &mut Binding<'_>,
    m: &mut Mistakes,
) -> Option<JsonTopic> {
    let key = format!("{source} topic {:?}", entry.filter);
    let valid = topic_filter::is_valid(&entry.filter);
    m.require(
        valid,
        &key,
        "it is no topic filter",
        "write levels with / between; + and # only as whole levels",
    );
    let pointers = [("value", Some(&entry.value)), ("name", entry.name.as_ref())];
    for (field, pointer) in
        pointers.into_iter().chain([("time", entry.time.as_ref()), ("quality", entry.quality.as_ref())])
    {
        let Some(pointer) = pointer else { continue };
        let problem = format!("{field} = {pointer:?} is no JSON pointer");
        m.require(is_pointer(pointer), &key, problem, "write it as /a/b, or \"\" for all of it");
    }
    for (field, number) in [("scale", entry.scale), ("offset", entry.offset)] {
        let usable = number.is_none_or(|n| n.is_finite() && (field == "offset" || n != 0.0));
        m.require(usable, &key, format!("{field} is of no use"), "leave it out, or write a number");
    }
    let words_ok = entry.words.values().all(|number| number.is_finite());
    m.require(words_ok, &key, "words stand for what is no number", "write a number for each");
    let affine = (entry.scale.unwrap_or(1.0), entry.offset.unwrap_or(0.0));
    let mut target = |key: &str, id: &str, m: &mut Mistakes| {
        let (device, scale, shift) = match &entry.unit {
            Some(unit) => bind.convert(key, Some(&id.to_owned()), unit, m)?,
            None => (bind.device(key, id, m)?, 1.0, 0.0),
        };
        Some(Target { device, scale: affine.0 * scale, shift: affine.1 * scale + shift })
    };
    let whose = match (entry.device, entry.name, entry.level) {
        (Some(id), None, None) => {
            m.require(entry.devices.is_empty(), &key, "device and devices exclude each other", "keep one");
            target(&key, &id, m).map(Whose::One)
        }
        (None, name, level) if name.is_some() != level.is_some() => {
            m.require(
                !entry.devices.is_empty(),
                &key,
                "devices is empty",
                "list their names and your devices",
            );
            let levels = entry.filter.split('/').count();
            let deep = entry.filter.ends_with('#');
            let fits = level.is_none_or(|level| level >= 1 && (deep || level <= levels));
            m.require(fits, &key, "it has no such level", &format!("write 1 to {levels}"));
            let mut names = BTreeMap::new();
            for (name, id) in entry.devices {
                let key = format!("{key} devices {name:?}");
                names.extend(target(&key, &id, m).map(|target| (name, target)));
            }
            let at =
                name.map_or_else(|| NameAt::Level(level.unwrap_or(1).saturating_sub(1)), NameAt::Pointer);
            Some(Whose::Named { at, names })
        }
        _ => {
            m.add(&key, "it does not say whose value it is", "write one of device, name, level");
            None
        }
    };
    let max_age =
        entry.max_age.map_or(MAX_AGE, |span| at_least(&format!("{key} max_age"), span.0, MINUTE, m));
    Some(JsonTopic {
        filter: entry.filter,
        value: entry.value,
        whose: whose?,
        time: entry.time,
        quality: entry.quality,
        words: entry.words,
        max_age,
    })
}

/// RFC 6901, section 3.
fn is_pointer(text: &str) -> bool {
    let escapes = text.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    (text.is_empty() || text.starts_with('/')) && escapes
}
