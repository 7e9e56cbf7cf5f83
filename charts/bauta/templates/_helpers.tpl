{{- define "bauta.selector" -}}
app.kubernetes.io/name: bauta
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- define "bauta.labels" -}}
app.kubernetes.io/name: bauta
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Whether the pod needs iptables: that mode, its remains, or rules of others that are taken over. */}}
{{- define "bauta.iptables" -}}
{{- $variant := .Values.image.variant | default "" -}}
{{- $needed := or (not .Values.bpf.masquerade) .Values.takeOver .Values.cleanup.enabled -}}
{{- if or (eq $variant "iptables") (and $needed (ne $variant "ebpf")) }}true{{ end -}}
{{- end }}

{{- define "bauta.image" -}}
{{- $image := .Values.image -}}
{{- $tag := $image.tag | default .Chart.AppVersion -}}
{{- if include "bauta.iptables" . }}{{ $tag = printf "%s-iptables" $tag }}{{ end -}}
{{- printf "%s:%s" $image.repository $tag -}}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end }}

{{/* The address of /metrics, /healthz and /readyz. */}}
{{- define "bauta.listen" -}}
{{- if not .Values.prometheus.enabled }}127.0.0.1{{ end }}:{{ .Values.prometheus.port -}}
{{- end }}

{{/* The ConfigMaps that have the list, a map each, in YAML. A file bears the name of its ConfigMap. */}}
{{- define "bauta.lists" -}}
{{- $lists := list (dict "name" (.Values.ipMasqAgent.existingConfigMap | default "ip-masq-agent") "key" "config") -}}
{{- range .Values.ipMasqAgent.fragments -}}
{{- if kindIs "string" . }}{{ $lists = append $lists (dict "name" . "key" "config") }}{{ else }}{{ $lists = append $lists . }}{{ end -}}
{{- end -}}
{{- toYaml $lists -}}
{{- end }}

{{/* A value as the agent reads it: a list with commas, a number without an exponent. */}}
{{- define "bauta.text" -}}
{{- if kindIs "slice" . -}}
{{- $items := list -}}
{{- range . }}{{ $items = append $items (include "bauta.text" .) }}{{ end -}}
{{- join "," $items -}}
{{- else if kindIs "float64" . }}{{ int64 . -}}
{{- else if not (kindIs "invalid" .) }}{{ . -}}
{{- end -}}
{{- end }}
