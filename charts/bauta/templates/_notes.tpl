{{/* What works, but hardly as meant: a list in YAML. */}}
{{- define "bauta.notes" -}}
{{- $v := .Values -}}
{{- $notes := list -}}
{{- $off4 := eq (toString $v.enableIPv4Masquerade) "false" -}}
{{- $off6 := eq (toString $v.enableIPv6Masquerade) "false" -}}
{{- if and $off4 $off6 -}}
{{- $notes = append $notes "enableIPv4Masquerade and enableIPv6Masquerade are both false: nothing is masqueraded." -}}
{{- end -}}
{{- $config := $v.ipMasqAgent.config | default dict -}}
{{- if and $v.ipMasqAgent.config (not $v.ipMasqAgent.enabled) -}}
{{- $notes = append $notes "ipMasqAgent.config has no effect: ipMasqAgent.enabled is false." -}}
{{- else if and (or $v.ipMasqAgent.existingConfigMap $v.ipMasqAgent.fragments $v.ipMasqAgent.profile) (not $v.ipMasqAgent.enabled) -}}
{{- $notes = append $notes "ipMasqAgent has no effect: ipMasqAgent.enabled is false." -}}
{{- else if and $v.ipMasqAgent.config (not $config.nonMasqueradeCIDRs) (not $v.ipMasqAgent.fragments) -}}
{{- $notes = append $notes "ipMasqAgent.config has no nonMasqueradeCIDRs: everything but link-local destinations is masqueraded, private ranges too. Without ipMasqAgent.config private and reserved ranges are not." -}}
{{- end -}}
{{- if and (not $v.bpf.masquerade) $v.bpf.natMax -}}
{{- $notes = append $notes "bpf.natMax has no effect in iptables mode." -}}
{{- end -}}
{{- if and $v.bpf.masquerade $v.iptablesRandomFully -}}
{{- $notes = append $notes "iptablesRandomFully has no effect in eBPF mode." -}}
{{- end -}}
{{- if $v.masqueradeForwarded -}}
{{- $notes = append $notes "masqueradeForwarded: whatever the nodes forward is masqueraded, not pods alone." -}}
{{- end -}}
{{- if $v.takeOver -}}
{{- $notes = append $notes "takeOver: once the old rules are gone (bauta status names none), empty it." -}}
{{- end -}}
{{- if $v.startupTaint.enabled -}}
{{- $notes = append $notes (printf "startupTaint: nodes have to register with %s:NoSchedule (kubelet --register-with-taints, or the node pool); the agent only takes it off." $v.startupTaint.key) -}}
{{- end -}}
{{- if $v.existingConfigDirConfigMap -}}
{{- $notes = append $notes (printf "existingConfigDirConfigMap: a change of %s takes effect when the pods are replaced: kubectl -n %s rollout restart daemonset/bauta" $v.existingConfigDirConfigMap .Release.Namespace) -}}
{{- end -}}
{{- if and (dig "limits" "memory" "" $v.resources) $v.bpf.masquerade $v.bpf.natMax -}}
{{- $notes = append $notes "resources.limits.memory: the tables of the data plane count as memory of the container, up to 560 bytes an entry of bpf.natMax. With a lower limit the agent can't make them. With bpf.natMax empty their size follows the limit." -}}
{{- end -}}
{{- if and $v.image.digest (include "bauta.iptables" .) -}}
{{- $notes = append $notes "image.digest has to be that of the iptables variant." -}}
{{- end -}}
{{- if and (or $v.prometheus.rules.enabled $v.prometheus.dashboard.enabled) (not $v.prometheus.enabled) -}}
{{- $notes = append $notes "prometheus.rules and prometheus.dashboard show nothing: prometheus.enabled is false." -}}
{{- end -}}
{{- if $notes }}{{ toYaml $notes }}{{ end -}}
{{- end }}
