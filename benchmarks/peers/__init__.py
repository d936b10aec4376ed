"""The servers that Marina is compared with: each as its own documentation shows it, and with Marina's model inside."""
