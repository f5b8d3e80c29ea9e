use super::*;
use crate::settings::{I2cChip, Settings, Source, tests::load};

/// The configuration of these findings with the three keys that nobody but the plant knows.
fn filled_in(findings: &Findings) -> (String, Settings) {
    let text = configuration(findings);
    let filled = ["site", "gateway", "data_dir"].iter().fold(text.clone(), |text, key| {
        let empty = format!("\n{key} = \"\"");
        assert!(text.contains(&empty), "{text}");
        text.replacen(&empty, &format!("\n{key} = \"x\""), 1)
    });
    let settings = load(&filled, &[]).unwrap_or_else(|mistakes| panic!("{mistakes}\n{filled}"));
    (text, settings)
}

fn bus(path: &str, answers: Result<Vec<(u8, Answer)>, &str>) -> I2cFinding {
    I2cFinding { path: path.to_owned(), answers: answers.map_err(str::to_owned) }
}

#[test]
fn the_configuration_is_complete_and_says_the_rest() {
    let answers = vec![
        (0x20, Answer::Unknown),
        (0x44, Answer::Sht4x { serial: 0x5a17_0044 }),
        (0x48, Answer::Ads1115),
        (0x4b, Answer::Ads1115),
        (0x68, Answer::Fault),
        (0x70, Answer::Unknown),
    ];
    let findings = Findings {
        i2c: vec![
            bus("/dev/i2c-1", Ok(answers)),
            bus("/dev/i2c-3", Ok(vec![(0x45, Answer::Sht4x { serial: 1 })])),
            bus("/dev/i2c-4", Ok((0x08..=0x77).map(|at| (at, Answer::Fault)).collect())),
            bus("/dev/i2c-9", Err("opening i2c bus /dev/i2c-9; is the bus enabled")),
        ],
    };
    let (text, settings) = filled_in(&findings);
    assert_eq!(settings.registry.devices.len(), 2 + 4 + 4 + 2);
    let probes: Vec<_> = settings
        .sources
        .iter()
        .map(|source| match source {
            Source::I2c { path, probes } => {
                let loops = probes.iter().filter(|p| matches!(p.chip, I2cChip::Loop { .. })).count();
                (path.as_str(), loops, probes.len() - loops)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(probes, [("/dev/i2c-1", 8, 1), ("/dev/i2c-3", 0, 1)]);
    for part in [
        "# 0x44: SHT4x, serial number 1511456836 (0x5a170044).",
        "#   0x20: often a port expander (PCF8574, MCP23017)\n#   0x70\n",
        "# At 0x68 the bus failed: Linux itself holds that chip, or the wiring is bad.",
        "# At 112 addresses the bus failed.",
        "# It could not be scanned: opening i2c bus /dev/i2c-9; is the bus enabled",
    ] {
        assert!(text.contains(part), "{part:?} not in {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");
}

#[test]
fn nothing_found_is_a_configuration_too() {
    let findings = Findings { i2c: vec![bus("/dev/i2c-1", Ok(Vec::new()))] };
    let (text, settings) = filled_in(&findings);
    assert!(
        settings.sources.is_empty() && text.contains("# No chip that this agent has a driver for."),
        "{text}"
    );
}
