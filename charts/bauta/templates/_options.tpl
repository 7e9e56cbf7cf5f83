{{/*
The agent's options, as a map in YAML: those that a value is given for, so that others keep the agent's default.
Some options are not read from a directory: they are arguments of the container.
*/}}
{{- define "bauta.options" -}}
{{- $v := .Values -}}
{{- $o := dict "enable-k8s" "true" "enable-bpf-masquerade" (toString $v.bpf.masquerade) "enable-ip-masq-agent" (toString $v.ipMasqAgent.enabled) -}}
{{- if $v.ipMasqAgent.enabled -}}
{{- $_ := set $o "ip-masq-agent-config-path" "/etc/bauta/ip-masq-agent" -}}
{{- end -}}
{{- if $v.startupTaint.enabled -}}
{{- $_ := set $o "k8s-startup-taint" $v.startupTaint.key -}}
{{- end -}}
{{- range $option, $value := dict
  "enable-ipv4-masquerade" $v.enableIPv4Masquerade
  "enable-ipv6-masquerade" $v.enableIPv6Masquerade
  "ipv4-native-routing-cidr" $v.ipv4NativeRoutingCIDR
  "ipv6-native-routing-cidr" $v.ipv6NativeRoutingCIDR
  "devices" $v.devices
  "egress-masquerade-interfaces" $v.egressMasqueradeInterfaces
  "enable-masquerade-to-route-source" $v.enableMasqueradeRouteSource
  "iptables-random-fully" $v.iptablesRandomFully
  "remote-node-masquerade" $v.remoteNodeMasquerade
  "enable-remote-node-masquerade" $v.enableRemoteNodeMasquerade
  "pod-cidrs" $v.podCIDRs
  "masquerade-forwarded" $v.masqueradeForwarded
  "node-port-range" $v.nodePortRange
  "snat-port-range" $v.snatPortRange
  "unknown-protocols" $v.unknownProtocols
  "ip-masq-agent-profile" $v.ipMasqAgent.profile
  "drain-timeout" $v.drainTimeout
  "take-over" $v.takeOver
-}}
{{- with include "bauta.text" $value }}{{ $_ := set $o $option . }}{{ end -}}
{{- end -}}
{{- with $v.bpf.natMax -}}
{{- /* From a directory the agent takes the number as Cilium means it, in entries; from a file in flows. */ -}}
{{- $n := int64 . -}}
{{- if $v.existingConfigDirConfigMap }}{{ $n = div (add $n 1) 2 }}{{ end -}}
{{- $_ := set $o "bpf-nat-global-max" (toString $n) -}}
{{- end -}}
{{- range $option, $value := $v.extraConfig -}}
{{- $_ := set $o $option (include "bauta.text" $value) -}}
{{- end -}}
{{- toYaml $o -}}
{{- end }}
