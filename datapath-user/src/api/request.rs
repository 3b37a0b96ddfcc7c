//! Requests as checked values, and the answer to one.

use std::path::PathBuf;

use eniway_agent_api::{self as proto, AddRequest, AddResponse, Reason, is_container_id};
use tonic::Status;

use crate::{
    agent::asks::View,
    attachment::{Attachment, Extras, Route, sysctl_parts},
    bandwidth::{Asked, Bandwidth},
    net::InterfaceName,
};

fn invalid(message: impl Into<String>) -> Status {
    proto::status(Reason::Invalid, message)
}

/// Which sandbox, and which interface in it.
pub(super) fn identity(attachment: Option<proto::Attachment>) -> Result<(String, InterfaceName), Status> {
    let proto::Attachment { container_id, interface } =
        attachment.ok_or_else(|| invalid("no attachment is given"))?;
    if !is_container_id(&container_id) {
        return Err(invalid(format!(
            "container id `{container_id}` is not 1 to 128 letters, digits, `_`, `.` and `-`"
        )));
    }
    let name = InterfaceName::new(&interface);
    let name = name.ok_or_else(|| invalid(format!("`{interface}` cannot be an interface's name")))?;
    Ok((container_id, name))
}

/// What is asked for.
pub(super) fn attachment(request: &AddRequest) -> Result<Attachment, Status> {
    let (container_id, interface) = identity(request.attachment.clone())?;
    let netns = PathBuf::from(&request.netns);
    if !netns.is_absolute() {
        return Err(invalid(format!("netns `{}` is not an absolute path", request.netns)));
    }
    let pod = request.pod.clone().unwrap_or_default();
    let mtu = match request.mtu {
        0 => None,
        mtu => Some(
            u16::try_from(mtu)
                .ok()
                .filter(|mtu| *mtu >= 576)
                .ok_or_else(|| invalid(format!("mtu {mtu} is not between 576 and 65535")))?,
        ),
    };
    let routes = request.routes.iter().map(|route| {
        let destination = route.destination.parse().map_err(|_| {
            invalid(format!("route to `{}`: not an IPv4 prefix such as 10.0.0.0/8", route.destination))
        })?;
        let gateway = match route.gateway.as_str() {
            "" => None,
            text => {
                Some(text.parse().map_err(|_| invalid(format!("gateway `{text}`: not an IPv4 address")))?)
            }
        };
        Ok(Route { destination, gateway })
    });
    let routes = routes.collect::<Result<_, Status>>()?;
    let sysctls = request
        .sysctls
        .iter()
        .map(|sysctl| Ok((sysctl_parts(&sysctl.key, &interface).map_err(invalid)?, sysctl.value.clone())));
    let sysctls = sysctls.collect::<Result<_, Status>>()?;
    let asked = request.bandwidth.unwrap_or_default();
    let asked = Asked {
        ingress_rate: asked.ingress_rate,
        ingress_burst: asked.ingress_burst,
        egress_rate: asked.egress_rate,
        egress_burst: asked.egress_burst,
    };
    let bandwidth = Bandwidth::new(&asked).map_err(|what| invalid(format!("bandwidth: {what}")))?;
    // A runtime that knows no pods is asked for containers.
    let or_container = |text: String| if text.is_empty() { container_id.clone() } else { text };
    Ok(Attachment {
        namespace: if pod.namespace.is_empty() { "default".to_owned() } else { pod.namespace },
        name: or_container(pod.name),
        uid: or_container(pod.uid),
        container_id,
        interface,
        netns,
        mtu,
        bandwidth,
        extras: Extras { routes, sysctls },
    })
}

/// What a runtime is told of a pod.
pub(super) fn answer(view: &View) -> Result<AddResponse, Status> {
    let pod = &view.pod;
    let route = |route: &Route| proto::Route {
        destination: route.destination.to_string(),
        gateway: route.gateway.unwrap_or(pod.gateway).to_string(),
    };
    let default = proto::Route { destination: "0.0.0.0/0".to_owned(), gateway: pod.gateway.to_string() };
    Ok(AddResponse {
        host_interface: view.host_interface.clone().unwrap_or_default(),
        host_mac: view.host_interface.as_ref().map_or_else(String::new, |_| pod.gateway_mac.to_string()),
        mac: pod.mac.to_string(),
        ipv4: format!("{}/32", pod.ipv4),
        gateway: pod.gateway.to_string(),
        mtu: pod.mtu.into(),
        routes: std::iter::once(default).chain(pod.extras.routes.iter().map(route)).collect(),
    })
}
