//! The agent's disks over TCP: stock clients (libnbd) with certificates get the disk their certificate names, and nothing
//! else; without one, nothing at all. Needs nbdinfo and nbdcopy (package libnbd-bin).

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use muster_agent::{Agent, Deps, Stop};
use muster_common::ErrorCode;
use muster_idl::v1::Verb;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use support::{Controller, Depot, Place, image_bytes, libnbd, network, template, vm_on};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn named(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn authority() -> Authority {
    let mut params = named("tests");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes `KIND-cert.pem`, `KIND-key.pem` and `ca-cert.pem` into a directory, as libnbd wants them.
fn issue(by: &Authority, to: &Path, kind: &str, common_name: &str, names: Vec<SanType>) {
    let key = KeyPair::generate().unwrap();
    let mut params = named(common_name);
    params.subject_alt_names = names;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![if kind == "server" { ExtendedKeyUsagePurpose::ServerAuth } else { ExtendedKeyUsagePurpose::ClientAuth }];
    std::fs::create_dir_all(to).unwrap();
    std::fs::write(to.join("ca-cert.pem"), by.pem()).unwrap();
    std::fs::write(to.join(format!("{kind}-cert.pem")), params.signed_by(&key, by).unwrap().pem()).unwrap();
    std::fs::write(to.join(format!("{kind}-key.pem")), key.serialize_pem()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_opens_the_disk_it_names_over_tcp_and_nothing_else() {
    let (network, depot, place) = (network(95), Depot::start().await, Place::new(95));
    let (ours, pki) = (authority(), place.path().join("pki"));
    let local = vec![SanType::DnsName("localhost".try_into().unwrap()), SanType::IpAddress([127, 0, 0, 1].into())];
    issue(&ours, &pki.join("server"), "server", "server", local);
    let mut config = place.config();
    config.nbd.listen = Some(([127, 0, 0, 1], 0).into());
    config.nbd.certificate = Some(pki.join("server/server-cert.pem"));
    config.nbd.authority = Some(pki.join("server/ca-cert.pem"));
    config.nbd.everything = vec!["backup-host".into()];
    config.nbd.key = Some(pki.join("not-there.pem"));
    let deps = Deps { bus: Some(network.join("early")), ..Deps::default() };
    let refused = Agent::start(config.clone(), deps).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::InvalidArgument);
    assert!(refused.to_string().contains("nbd.key") && refused.to_string().contains("not-there.pem"), "{refused}");
    config.nbd.key = Some(pki.join("server/server-key.pem"));
    let agent = place.start_with(&network, config).await;
    let address = agent.nbd_address().unwrap();

    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let image = depot.import(image_bytes(4, 2));
    let vm = vm_on(&agent, "desk");
    let template = template(&image, Some(1));
    controller.done(Verb::Create, std::slice::from_ref(&vm), &[("template", &template)]).await;
    let shown = controller.system(&vm, "two disks", |s| s.disks.len() == 2).await;
    let [system, data] = [0, 1].map(|n| format!("{}.{}", shown.disks[n].volume, shown.disks[n].generation));
    let volume = format!("muster:volume:{}", shown.disks[0].volume);
    issue(&ours, &pki.join("desk"), "client", "backup-host", vec![SanType::URI(volume.as_str().try_into().unwrap())]);
    issue(&ours, &pki.join("backup"), "client", "backup-host", vec![]);
    issue(&authority(), &pki.join("stranger"), "client", "backup-host", vec![]);
    std::fs::copy(pki.join("server/ca-cert.pem"), pki.join("stranger/ca-cert.pem")).unwrap();

    let uri =
        |who: &str, export: &str| format!("nbds://{address}/{export}?tls-certificates={}", pki.join(who).display());
    let copied = place.path().join("copy").display().to_string();
    let Some(list) = libnbd("nbdinfo", &["--list".into(), "--no-content".into(), uri("desk", "")]).await else {
        return;
    };
    let said = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(said.contains(&system) && !said.contains(&data), "{said} {}", String::from_utf8_lossy(&list.stderr));
    let copy = async |from: String| {
        let _ = std::fs::remove_file(&copied);
        libnbd("nbdcopy", &[from, copied.clone()]).await.unwrap().status.success()
    };
    assert!(copy(uri("desk", &system)).await);
    assert!(std::fs::read(&copied).unwrap() == image_bytes(4, 2), "it is the disk's content");
    // the certificate's names count before its common name
    assert!(!copy(uri("desk", &data)).await, "another disk of the same VM");
    assert!(!copy(uri("stranger", &system)).await, "of an authority that is not ours");
    assert!(!copy(format!("nbd://{address}/{system}")).await, "in the clear");
    assert!(copy(uri("backup", &data)).await && copy(uri("backup", &system)).await);
    agent.stop(Stop::Force).await.unwrap();
}
