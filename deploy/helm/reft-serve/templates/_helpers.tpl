{{- define "reft-serve.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "reft-serve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "reft-serve.labels" -}}
{{ include "reft-serve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "reft-serve.account" -}}
{{- .Values.serviceAccount.name | default (include "reft-serve.name" .) -}}
{{- end -}}

{{- define "reft-serve.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "reft-serve.key" -}}
secretKeyRef: {name: {{ .secret }}, key: {{ .key }}}
{{- end -}}

{{/* A setting as the server reads it: Helm would write 1000000 from a file as 1e+06. */}}
{{- define "reft-serve.setting" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* What no schema can say: one setting that rules out another. */}}
{{- define "reft-serve.check" -}}
{{- if not .Values.storage.shared -}}
{{- if gt (int .Values.replicas) 1 -}}
{{- fail (printf "replicas: got %d, expected at most 1 unless storage.shared is true: an embedded catalog belongs to one pod" (int .Values.replicas)) -}}
{{- end -}}
{{- if .Values.autoscaling.enabled -}}
{{- fail "autoscaling.enabled: got true, expected false unless storage.shared is true: an embedded catalog belongs to one pod" -}}
{{- end -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas: got %d, expected at most maxReplicas, %d" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
