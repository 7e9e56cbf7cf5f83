{{/* What the agent's pods and those of the clean-up have in common. */}}
{{- define "bauta.pod" -}}
hostNetwork: true
# The node's own resolver: that of the cluster may be behind what is masqueraded here.
dnsPolicy: Default
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "bauta.tolerations" . | fromYamlArray }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  seccompProfile: {type: RuntimeDefault}
  # The default profile forbids to write below /sys, and so to pin programs.
  appArmorProfile: {type: Unconfined}
  {{- with .Values.seLinuxOptions }}
  seLinuxOptions:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Those given, and the start-up taint: on a node that it keeps the agent from it would stay for ever. */}}
{{- define "bauta.tolerations" -}}
{{- $list := .Values.tolerations | default list -}}
{{- $all := dict "operator" "Exists" -}}
{{- if and .Values.startupTaint.enabled (not (has $all $list)) -}}
{{- $list = append $list (dict "key" .Values.startupTaint.key "operator" "Exists") -}}
{{- end -}}
{{- toYaml $list -}}
{{- end }}

{{- define "bauta.container" -}}
image: {{ include "bauta.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  runAsUser: 0
  privileged: false
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    add:
      {{- include "bauta.capabilities" . | nindent 6 }}
{{- end }}

{{- define "bauta.capabilities" -}}
- BPF
- NET_ADMIN
- PERFMON
{{- if include "bauta.iptables" . }}
- NET_RAW
{{- end }}
{{- if .Values.sysResource }}
- SYS_RESOURCE
{{- end }}
{{- range .Values.extraCapabilities }}
- {{ . }}
{{- end }}
{{- end }}

{{- define "bauta.hostMounts" -}}
- {name: bpffs, mountPath: /sys/fs/bpf, mountPropagation: HostToContainer}
- {name: run, mountPath: /run/bauta}
{{- if include "bauta.iptables" . }}
- {name: xtables-lock, mountPath: /run/xtables.lock}
{{- end }}
{{- end }}

{{- define "bauta.hostVolumes" -}}
# Pins here outlive the agent.
- name: bpffs
  hostPath: {path: /sys/fs/bpf, type: Directory}
# agent.sock and policy.json, for the commands on the node and for the next agent.
- name: run
  hostPath: {path: /run/bauta, type: DirectoryOrCreate}
{{- if include "bauta.iptables" . }}
# Against others that change rules at the same time.
- name: xtables-lock
  hostPath: {path: /run/xtables.lock, type: FileOrCreate}
{{- end }}
{{- end }}
