"""seqpar"""
