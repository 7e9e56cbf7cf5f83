{{/* Combinations that a schema can't see, refused before anything is installed. */}}
{{- define "bauta.check" -}}
{{- $v := .Values -}}
{{- if and $v.ipMasqAgent.config $v.ipMasqAgent.existingConfigMap -}}
{{- fail "ipMasqAgent: config makes a ConfigMap and existingConfigMap adopts one: give one of the two, and further ones as ipMasqAgent.fragments" -}}
{{- end -}}
{{- $names := list -}}
{{- range include "bauta.lists" . | fromYamlArray -}}
{{- if has .name $names }}{{ fail (printf "ipMasqAgent.fragments: %s is read already" .name) }}{{ end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if and $v.remoteNodeMasquerade (not (kindIs "invalid" $v.enableRemoteNodeMasquerade)) -}}
{{- fail "remoteNodeMasquerade and enableRemoteNodeMasquerade say the same: give only remoteNodeMasquerade" -}}
{{- end -}}
{{- if eq $v.existingConfigDirConfigMap "bauta-config" -}}
{{- fail "existingConfigDirConfigMap: bauta-config is the one that this chart makes" -}}
{{- end -}}
{{- if and (eq ($v.image.variant | default "") "ebpf") (or (not $v.bpf.masquerade) $v.takeOver) -}}
{{- fail "image.variant: ebpf has no iptables, which iptables mode and takeOver need: leave it empty" -}}
{{- end -}}
{{- $devices := include "bauta.text" $v.devices -}}
{{- $egress := include "bauta.text" $v.egressMasqueradeInterfaces -}}
{{- if and $v.bpf.masquerade $devices $egress (ne $devices $egress) -}}
{{- fail "devices and egressMasqueradeInterfaces: in eBPF mode both mean the same, but differ: give only devices" -}}
{{- end -}}
{{- if and (not $v.prometheus.enabled) (or $v.prometheus.serviceMonitor.enabled $v.prometheus.podMonitor.enabled) -}}
{{- fail "prometheus.serviceMonitor and prometheus.podMonitor: nothing to scrape unless prometheus.enabled is true" -}}
{{- end -}}
{{- if and $v.prometheus.serviceMonitor.enabled $v.prometheus.podMonitor.enabled -}}
{{- fail "prometheus: serviceMonitor and podMonitor together scrape everything twice: enable one" -}}
{{- end -}}
{{- end }}
